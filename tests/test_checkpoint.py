"""What is saved comes back, on any mesh; what does not fit is refused by name."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from mixtral_jax.checkpoint import UNFINISHED, Checkpoints
from mixtral_jax.config import UserError
from mixtral_jax.fingerprint import fingerprints
from mixtral_jax.models import mixtral
from mixtral_jax.optim import make_optimizer
from mixtral_jax.sharding import named_leaves, tree_shardings
from mixtral_jax.workdir import load_run, store_run
from tests import processes
from tests.helpers import on_mesh, tiny

META = {"tokenizer": "abc", "step": 7}


def random_state(config, mesh, seed=0):
    """Parameters and moments of random values: what is left at its initial zeros would pass unrestored."""
    params = mixtral.abstract(config.model)
    opt_state = jax.eval_shape(make_optimizer(config.optim, config.train.steps).init, params)
    rng = np.random.default_rng(seed)
    tree = jax.tree.map(lambda leaf: (100 * rng.random(leaf.shape)).astype(leaf.dtype), (params, opt_state))
    return jax.device_put(tree, tree_shardings(tree, mesh, tree[0]))


def assert_equal(got, want):
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        assert got[name].dtype == leaf.dtype, name
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)


def saved(folder, config, mesh, steps=(7,), keep=1):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, *random_state(config, mesh, seed=step), META | {"step": step}, {"at": [step, 12345]})
    checkpoints.close()


@pytest.fixture
def opened(tmp_path):
    """Returns a function that opens the checkpoints of tmp_path as another process would."""
    made = []

    def open_(keep=1):
        made.append(Checkpoints(tmp_path, keep))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


@pytest.mark.parametrize("axes", [dict(), dict(fsdp=8)], ids=["one_device", "fsdp8"])
def test_a_checkpoint_comes_back_on_another_mesh(tmp_path, opened, axes):
    config, mesh = on_mesh(tiny(), fsdp=2, expert=2, tensor=2)
    saved(tmp_path, config, mesh)
    want = random_state(config, mesh, seed=7)
    _, mesh = on_mesh(tiny(), **axes)
    like = random_state(config, mesh, seed=1)
    checkpoints = opened()
    params, opt_state = checkpoints.restore(7, *like)
    assert checkpoints.meta(7).items() >= META.items()
    assert_equal(params, want[0])
    assert_equal(opt_state, want[1])
    for leaf, target in zip(jax.tree.leaves((params, opt_state)), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


def test_parameters_come_back_alone(tmp_path, opened):
    config, mesh = on_mesh(tiny(), fsdp=8)
    saved(tmp_path, config, mesh)
    like = mixtral.abstract(config.model)
    shardings = tree_shardings(like, mesh, like)
    like = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), like, shardings)
    params = opened().restore_params(7, like)
    assert_equal(params, random_state(config, mesh, seed=7)[0])
    for leaf, target in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


def test_arrays_may_be_donated_while_a_save_is_in_flight(tmp_path, opened):
    config, mesh = on_mesh(tiny(), fsdp=8)
    checkpoints = opened()
    state = random_state(config, mesh)
    want = jax.device_get(state)
    checkpoints.save(1, *state, META)
    jax.tree.map(lambda leaf: leaf.delete(), state)
    checkpoints.close()
    like = random_state(config, mesh, seed=1)
    params, opt_state = opened().restore(1, *like)
    assert_equal(params, want[0])
    assert_equal(opt_state, want[1])


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(model__d_ff=40), ["w_gate_EDF", "w_up_EDF", "w_down_EFD", "(2, 8, 32, 48)", "(2, 8, 32, 40)"]),
        (dict(model__num_layers=3), ["layers.w_q_DNH"]),
        (dict(model__router_bias=True), ["router_bias_E: checkpoint none, now (2, 8)"]),
    ],
    ids=["smaller", "more_layers", "one_more"],
)
def test_another_model_is_refused_with_the_names_of_what_differs(tmp_path, opened, changes, names):
    config, mesh = on_mesh(tiny())
    saved(tmp_path, config, mesh)
    other, mesh = on_mesh(tiny(**changes))
    like = random_state(other, mesh)
    checkpoints = opened()
    for restore in (lambda: checkpoints.restore(7, *like), lambda: checkpoints.restore_params(7, like[0])):
        with pytest.raises(UserError, match="is of another model") as error:
            restore()
        for name in names:
            assert name in str(error.value)
        assert "head_DV" not in str(error.value)


def test_another_optimizer_is_refused(tmp_path, opened):
    config, mesh = on_mesh(tiny())
    saved(tmp_path, config, mesh)
    other, mesh = on_mesh(tiny(optim__name="muon"))
    with pytest.raises(UserError, match="is of another optimizer"):
        opened().restore(7, *random_state(other, mesh))


def test_the_latest_checkpoints_stay_and_looking_at_them_removes_none(tmp_path, opened):
    config, mesh = on_mesh(tiny())
    saved(tmp_path, config, mesh, steps=(2, 4, 10, 12), keep=3)
    checkpoints = opened(keep=1)  # as an evaluation opens them
    assert checkpoints.steps() == [4, 10, 12]
    assert checkpoints.latest() == 12
    params, _ = checkpoints.restore(4, *random_state(config, mesh))
    assert_equal(params, random_state(config, mesh, seed=4)[0])
    assert checkpoints.meta(4)["step"] == 4
    checkpoints.close()
    assert opened(keep=1).steps() == [4, 10, 12]


def test_what_stays(tmp_path):
    """The latest two, every multiple of ten, and the best of those whose held-out loss is known."""
    config, mesh = on_mesh(tiny())
    state = random_state(config, mesh)
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=10, keep_best=True)
    stay = {}
    for step, loss in ((2, 3.0), (4, 1.0), (8, None), (10, 2.0), (12, float("nan")), (14, 2.5), (16, 1.5)):
        checkpoints.save(step, *state, META | {"heldout_loss": loss})
        checkpoints.finish()
        stay[step] = checkpoints.steps()
    checkpoints.close()
    assert stay[4] == [2, 4]
    assert stay[8] == [4, 8]
    assert stay[10] == [4, 8, 10]
    assert stay[12] == [4, 10, 12]
    assert stay[16] == [4, 10, 14, 16]
    checkpoints = Checkpoints(tmp_path, keep=2, keep_best=True)
    assert checkpoints.best() == 4
    checkpoints.save(18, *state, META | {"heldout_loss": 0.5})
    checkpoints.close()
    assert checkpoints.steps() == [16, 18]
    assert checkpoints.best() == 18
    assert {path.name for path in checkpoints.folder.iterdir()} == {"16", "18"}, "what is removed is removed for good"


def test_data_state_and_metadata_come_back(tmp_path, opened):
    config, mesh = on_mesh(tiny())
    checkpoints = Checkpoints(tmp_path)
    state = {"stream": {"shard": 3, "row": [1, 2]}, "window": 7}
    checkpoints.save(1, *random_state(config, mesh), META, state)
    checkpoints.close()
    assert opened().data(1) == state
    assert opened().meta(1).items() >= META.items()


def test_half_a_checkpoint_is_none_and_is_cleaned_up(tmp_path, opened):
    config, mesh = on_mesh(tiny())
    saved(tmp_path, config, mesh)
    folder = tmp_path / "checkpoints"
    for name in ("9.orbax-checkpoint-tmp", "5.removed"):
        shutil.copytree(folder / "7", folder / name)
    (folder / "notes").mkdir()  # not ours, not touched
    checkpoints = opened()
    assert checkpoints.steps() == [7]
    assert checkpoints.clean() == ["5.removed", "9.orbax-checkpoint-tmp"]
    assert {path.name for path in folder.iterdir()} == {"7", "notes"}


def test_orbax_still_writes_aside_under_the_name_that_we_clean_up(tmp_path, monkeypatch):
    """A release that names its unfinished folders otherwise would leave them lying for ever."""
    config, mesh = on_mesh(tiny())
    checkpoints = Checkpoints(tmp_path)
    seen = set()
    checkpoints.save(3, *random_state(config, mesh), META)
    while checkpoints.poll() is None:
        seen |= {path.name for path in checkpoints.folder.iterdir()}
    checkpoints.close()
    assert seen - {"3"}, "the save was over before it was looked at"
    assert all(UNFINISHED in name for name in seen - {"3"})


@pytest.fixture(scope="module")
def damages(tmp_path_factory):
    """What tests/damage.py found: it runs in a process of its own, because Orbax drops coroutines where a read fails."""
    env = processes.environment(devices=8, PYTHONWARNINGS="ignore")
    folder = str(tmp_path_factory.mktemp("damage"))
    line = [sys.executable, "-m", "tests.damage", folder]
    done = subprocess.run(line, cwd=processes.ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
def test_no_damage_goes_unnoticed(damages, how):
    """Whichever file of a checkpoint is changed: it is called damaged, or what comes back is what was saved."""
    found = damages[how]
    assert set(found.values()) <= {"noticed", "harmless"}, found
    noticed = [name for name, result in found.items() if result == "noticed"]
    assert {name.split("/")[0] for name in noticed} >= {"params", "opt_state", "meta", "data"}


def test_a_damaged_checkpoint_is_set_aside_and_its_number_is_free_again(tmp_path, opened):
    config, mesh = on_mesh(tiny())
    saved(tmp_path, config, mesh, steps=(7, 8), keep=2)
    checkpoints = opened(keep=2)
    state = random_state(config, mesh)
    for expected in ("8", "8-1"):
        assert checkpoints.set_aside(8) == tmp_path / "damaged" / expected
        assert checkpoints.steps() == [7]
        checkpoints.save(8, *state, META)
        assert checkpoints.finish() == 8
    assert checkpoints.steps() == [7, 8]


def test_a_fingerprint_does_not_depend_on_the_mesh_and_sees_every_change():
    tree = {"a": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b": np.zeros((8,), np.int32), "c": np.float32(0)}
    spread = jax.device_put(tree["a"], jax.sharding.NamedSharding(on_mesh(tiny(), fsdp=8)[1], jax.P("fsdp")))
    want = fingerprints(tree)
    assert fingerprints(tree | {"a": spread}) == want
    changed = tree["a"].copy()
    changed[3, 4] = -changed[3, 4]
    assert fingerprints(tree | {"a": changed})["a"] != want["a"]
    assert fingerprints(tree | {"a": tree["a"][::-1]})["a"] != want["a"], "order counts"
    assert fingerprints(tree | {"c": np.float32(-0.0)})["c"] != want["c"], "bits count, not values"
    assert fingerprints(tree | {"b": np.zeros((9,), np.int32)})["b"] != want["b"]


def test_an_empty_folder_has_no_checkpoint(opened):
    checkpoints = opened()
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []


def test_a_run_comes_back_and_a_missing_or_damaged_one_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load_run(tmp_path)
    config = tiny().to_dict()
    store_run(tmp_path, config)
    assert load_run(tmp_path) == config
    (tmp_path / "config.json").write_text(json.dumps(config)[:100])
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        load_run(tmp_path)
