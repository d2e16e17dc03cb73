"""Checkpoints: exact, whole or absent, and every changed byte noticed."""

import errno
import os
import shutil

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiem.errors import CheckpointError, StorageError
from kiem.runs import checkpoint, tensorfile

DTYPES = sorted(tensorfile.DTYPES.values(), key=str)


def example(step=0):
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 5, generator=generator)
    return {
        "model": {"tok_emb.weight": weight, "norm.weight": torch.ones(5)},
        "optimizer": {"tok_emb.weight.exp_avg": weight.bfloat16(), "step": torch.tensor(float(step))},
        "random": {"torch": generator.get_state()},
    }


def example_state(step=0):
    return {"step": step, "tokens": 1000 * step, "config": {"model": {"emb_dim": 5, "n_heads": 1}}, "loss": 0.1 + step}


def save(run, step):
    return checkpoint.save(run, step, example(step), example_state(step))


def load(path, groups=None):
    found = checkpoint.load(path, groups)
    return found.tensors, found.state


def load_latest(run):
    """(folder, tensors, state, what is wrong with newer ones)."""
    found, problems = checkpoint.newest(run)
    return (found.path, found.tensors, found.state, problems) if found else (None, {}, {}, problems)


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def bits(tensor):
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def files(path):
    return sorted(entry for entry in path.iterdir() if entry.is_file())


# Exactness ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 7)
    assert path == tmp_path / "checkpoints" / "step-00000007"
    tensors, state = load(path)
    assert state == example_state(7)
    assert {group: sorted(named) for group, named in tensors.items()} == {
        group: sorted(named) for group, named in example().items()
    }
    for group, named in example(7).items():
        for name, tensor in named.items():
            assert equal(tensors[group][name], tensor), (group, name)
    assert {entry.name for entry in path.iterdir()} == {
        "manifest.json",
        "state.json",
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000007"]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_tensors_come_back_bit_for_bit(tmp_path_factory, data):
    """Every data type, any bits (NaN payloads, -0, subnormals), empty, 0-d, sliced, transposed and expanded tensors."""
    named = {}
    for i in range(data.draw(st.integers(0, 4))):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        size = torch.empty(0, dtype=dtype).element_size()
        n = size * torch.Size(shape).numel()
        raw = data.draw(st.binary(min_size=n, max_size=n))
        if dtype == torch.bool:
            raw = bytes(b & 1 for b in raw)
        tensor = torch.frombuffer(bytearray(raw + b"\0" * size), dtype=dtype)[: n // size].reshape(shape)
        layout = data.draw(st.sampled_from(["plain", "transposed", "expanded", "sliced"]))
        if layout == "transposed" and tensor.ndim >= 2:
            tensor = tensor.transpose(0, 1)
        elif layout == "expanded":
            tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
        elif layout == "sliced" and tensor.ndim and tensor.shape[0] > 1:
            tensor = tensor[1:]
        named[data.draw(st.text(max_size=6)) + str(i)] = tensor
    path = tmp_path_factory.mktemp("t") / "x.safetensors"
    written = tensorfile.write_tensors(path, named)
    found = tensorfile.read_tensors(path, written["sha256"])
    assert written["bytes"] == path.stat().st_size
    assert found.keys() == named.keys()
    assert all(equal(found[name], tensor) for name, tensor in named.items())


def test_random_state_can_be_set_from_what_was_loaded(tmp_path):
    """torch.set_rng_state reads from the beginning of the storage: a view of a block sets garbage, or crashes."""
    state = torch.get_rng_state()
    before, after = torch.zeros(64, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    path = checkpoint.save(tmp_path, 1, {"random": {"a": before, "cpu": state, "z": after}}, {})
    expected = torch.rand(3)
    found = load(path)[0]["random"]["cpu"]
    assert found.storage_offset() == 0
    assert found.untyped_storage().nbytes() == len(state)
    torch.set_rng_state(found)
    assert torch.equal(torch.rand(3), expected)


def test_the_files_are_safetensors_for_any_reader(tmp_path):
    named = {str(dtype): torch.arange(7).to(dtype) for dtype in DTYPES if dtype != torch.complex64}
    checkpoint.save(tmp_path, 1, {"model": named}, {})
    read = safetensors.torch.load_file(tmp_path / "checkpoints/step-00000001/model.safetensors")
    assert all(equal(read[name], tensor) for name, tensor in named.items())
    with safetensors.safe_open(tmp_path / "checkpoints/step-00000001/model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.randn(1000, 10)
    model = {"tok_emb.weight": weight, "head.weight": weight, "view": weight[:500], "transposed": weight.T}
    path = checkpoint.save(tmp_path, 1, {"model": model}, {})
    assert (path / "model.safetensors").stat().st_size < 4 * (10_000 + 5_000 + 10_000) + 1000
    read = load(path)[0]["model"]
    assert all(equal(read[name], tensor) for name, tensor in model.items())
    assert read["head.weight"].data_ptr() == read["tok_emb.weight"].data_ptr()
    assert read["view"].data_ptr() != read["tok_emb.weight"].data_ptr()


def test_only_the_groups_asked_for_are_read_and_checked(tmp_path):
    path = save(tmp_path, 1)
    (path / "optimizer.safetensors").write_bytes(b"broken")
    tensors, state = load(path, groups=("model",))
    assert list(tensors) == ["model"]
    assert state == example_state(1)
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors; it has .*model\.safetensors"):
        load(path, groups=("ema",))


def test_numbers_of_the_state_are_exact(tmp_path):
    state = {"x": [0.1, 1e-320, 2**63, -0.0, 1 / 3], "text": "é\n\u2028", "none": None, "deep": {"a": [True, {}]}}
    checkpoint.save(tmp_path, 1, {}, state)
    path, _, found, _ = load_latest(tmp_path)
    assert found == state
    assert path.name == "step-00000001"
    assert str(found["x"][3]) == "-0.0"


def test_a_sparse_tensor_is_refused_by_name_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"odd: .*sparse"):
        checkpoint.save(tmp_path, 1, {"model": {"odd": torch.eye(2).to_sparse()}}, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    save(run, 1)
    return run, save(run, 2)


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_any_changed_byte_is_noticed_named_and_the_one_before_is_used(two_checkpoints, data):
    run, newest = two_checkpoints
    file = data.draw(st.sampled_from(files(newest)))
    original = file.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= data.draw(st.integers(1, 255))
    try:
        file.write_bytes(changed)
        assert_noticed(run, newest, file.name)
    finally:
        file.write_bytes(original)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_truncated_extended_and_replaced_files_are_noticed(two_checkpoints, data):
    run, newest = two_checkpoints
    file = data.draw(st.sampled_from(files(newest)))
    original = file.read_bytes()
    kind = data.draw(st.sampled_from(["truncate", "extend", "replace", "missing"]))
    try:
        if kind == "truncate":
            file.write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])
        elif kind == "extend":
            file.write_bytes(original + data.draw(st.binary(min_size=1, max_size=9)))
        elif kind == "replace":
            file.write_bytes(data.draw(st.binary(max_size=80)))
        else:
            file.unlink()
        assert_noticed(run, newest, file.name)
    finally:
        file.write_bytes(original)


def assert_noticed(run, newest, name):
    path, problems = checkpoint.latest(run)
    assert path == run / "checkpoints/step-00000001"
    assert len(problems) == 1
    assert str(newest) in problems[0]
    assert name in problems[0]
    with pytest.raises(CheckpointError) as caught:
        load(newest)
    assert str(newest) in str(caught.value)
    assert name in str(caught.value)
    path, tensors, state, problems = load_latest(run)
    assert path == run / "checkpoints/step-00000001"
    assert len(problems) == 1
    assert state == example_state(1)
    assert equal(tensors["model"]["tok_emb.weight"], example(1)["model"]["tok_emb.weight"])


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"1", b'{"sha256": "x"}', b"\xff\xfe", b"[" * 100_000, b'{"version": 1, "files": {}}'],
)
def test_a_manifest_that_is_not_one_is_noticed(tmp_path, text):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "manifest.json").write_bytes(text)
    path, problems = checkpoint.latest(tmp_path)
    assert path.name == "step-00000001"
    assert "manifest.json: changed since it was written" in problems[0]


def test_a_checkpoint_under_another_name(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, path.parent / "step-00000009")
    found, problems = checkpoint.latest(tmp_path)
    assert found == path
    assert "named step-00000009 but holds step 1" in problems[0]
    copy = tmp_path / "best"
    shutil.copytree(path, copy)
    assert load(copy)[1] == example_state(1)


def test_a_checkpoint_of_another_format_version(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"has format version 2; this Kiem reads version 1\."):
        load(path)


def test_no_checkpoint_at_all(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") == (None, [])
    assert load_latest(tmp_path) == (None, {}, {}, [])
    with pytest.raises(CheckpointError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "checkpoints/step-00000003").mkdir(parents=True)
    path, problems = checkpoint.latest(tmp_path)
    assert path is None
    assert "never finished" in problems[0]


# Another configuration ------------------------------------------------------------------------------------------------


def test_restore_copies_in_place_or_not_at_all(tmp_path):
    saved = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    targets = {"a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.bfloat16)}
    kept = targets["a"]
    checkpoint.restore(targets, saved, tmp_path, "model")
    assert torch.equal(kept, saved["a"])
    targets = {"a": torch.zeros(4), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.zeros(1), "d": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        saved |= {"d": torch.zeros(1, dtype=torch.int64), "e": torch.zeros(1)}
        checkpoint.restore(targets, saved, tmp_path, "model")
    text = str(caught.value)
    for part in (
        str(tmp_path),
        "b has shape [2] in the checkpoint, [3] in this run",
        "c is not in the checkpoint",
        "d is int64 in the checkpoint, float32 in this run",
        "e is in the checkpoint but not in this run",
    ):
        assert part in text
    assert torch.equal(targets["a"], torch.zeros(4))


# Saving over, removing ------------------------------------------------------------------------------------------------


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1)
    checkpoint.save(tmp_path, 1, example(1), {"second": True})
    path, _, state, problems = load_latest(tmp_path)
    assert state == {"second": True}
    assert problems == []
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000001"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    assert checkpoint.latest(tmp_path)[0].name == "step-100000000"


def names(run):
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


def test_prune_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == ["step-00000003", "step-00000002", "step-00000001"]
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    assert checkpoint.prune(tmp_path, 2) == []


def test_prune_does_not_count_damaged_ones(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    for step in (4, 5):
        file = tmp_path / f"checkpoints/step-{step:08d}/model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    assert checkpoint.latest(tmp_path)[0].name == "step-00000003"


def test_one_that_cannot_be_removed_is_told(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)

    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageError, match=r"cannot remove the old checkpoint .*step-00000001: Permission denied"):
        checkpoint.prune(tmp_path, 1)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        checkpoint.prune(tmp_path, 0)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / "state.json").unlink()
    (path / "state.json").mkdir()
    found, problems = checkpoint.latest(tmp_path)
    assert found.name == "step-00000001"
    assert "state.json: " in problems[0]


def test_prune_removes_a_folder_without_manifest(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "checkpoints/step-00000001").mkdir()
    checkpoint.prune(tmp_path, 1)
    assert names(tmp_path) == ["step-00000002"]
