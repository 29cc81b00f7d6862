"""The typed configuration. A ConfigDict becomes frozen dataclasses here, once, and every mistake is explained here.

Nothing in this package touches a device: a bad configuration is refused before anything is allocated.
"""

from mixtral_jax.config.checks import divisors, validate
from mixtral_jax.config.mesh import mesh_sizes, resolve_mesh
from mixtral_jax.config.read import from_config_dict
from mixtral_jax.config.types import (
    AXES,
    SPLASH_BLOCK,
    Config,
    DataConfig,
    DpoConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PreferenceLoss,
    RunError,
    SourceConfig,
    SourceKind,
    TrainConfig,
    UserError,
    key_list,
)

__all__ = [
    "AXES",
    "SPLASH_BLOCK",
    "Config",
    "DataConfig",
    "DpoConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PreferenceLoss",
    "RunError",
    "SourceConfig",
    "SourceKind",
    "TrainConfig",
    "UserError",
    "divisors",
    "from_config_dict",
    "key_list",
    "mesh_sizes",
    "resolve_mesh",
    "validate",
]
