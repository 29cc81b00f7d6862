"""A temporary corpus and its configuration, and a tokenizer trained once for the whole folder."""

import pytest

from mixtral_jax.config import DataConfig
from mixtral_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def make_data(tmp_path):
    """Returns a function that makes a DataConfig, by default of the folder tmp_path/corpus."""
    (tmp_path / "corpus").mkdir()

    def make(**changes):
        keys = {
            "source": "text",
            "path": str(tmp_path / "corpus"),
            "text_key": "text",
            "mixture": (),
            "streaming": False,
            "max_bad_rows": 0,
            "tokenizer": "bytes",
            "cache_dir": str(tmp_path / "cache"),
            "heldout_fraction": 0.3,
            "workers": 2,
        }
        return DataConfig(**{**keys, **changes})

    return make


@pytest.fixture(scope="session")
def shared_cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("shared_cache"))


@pytest.fixture(scope="session")
def stdlib_tokenizer(shared_cache_dir):
    return load_tokenizer("stdlib:4096", shared_cache_dir)
