"""What stands beside a checkpoint: it comes back whole, of the same run, or is refused by name."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexkd.core.losses import Projector
from flexkd.core.objective import Objective
from flexkd.core.selection import UnitPairs
from flexkd.core.terms import FeatureTerm, LayerPair, LogitTerm, TaskTerm
from flexkd.errors import ArtifactError
from flexkd.run_files import STATE_FILE, last_checkpoint
from flexkd.training.checkpoint import check_state, save_state

PAIRS = UnitPairs(torch.tensor([2, 0]), torch.tensor([5, 7]))
BASIS = torch.eye(8)[:, :4]
MADE_OF = {"teacher": "one", "training.seed": "0"}


def taught(*layers: LayerPair, weight: float = 1.0) -> Objective:
    return Objective(TaskTerm(weight=weight), LogitTerm(), FeatureTerm(layers=layers))


def projecting(seed: int) -> Objective:
    torch.manual_seed(seed)
    return Objective(features=FeatureTerm("projector", projectors=(Projector(4, 8),)))


def test_the_same_objective_is_accepted_and_the_folder_holds_one_file(tmp_path: Path) -> None:
    goal = taught(LayerPair(1, 2, PAIRS), LayerPair(-1, -1, PAIRS, BASIS))
    save_state(tmp_path, goal, MADE_OF)
    check_state(tmp_path, taught(LayerPair(1, 2, PAIRS), LayerPair(-1, -1, PAIRS, BASIS)), MADE_OF)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_S02_projectors_come_back_bit_for_bit(tmp_path: Path) -> None:
    saved, other = projecting(0), projecting(1)
    save_state(tmp_path, saved, {})
    assert not torch.equal(next(saved.parameters()), next(other.parameters()))
    check_state(tmp_path, other, {})
    assert all(torch.equal(one, two) for one, two in zip(saved.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        ((LayerPair(1, 2, UnitPairs(PAIRS.student, PAIRS.student)),), r"'pairs\.0\.teacher_units' differs"),
        ((LayerPair(1, 2, UnitPairs(PAIRS.teacher, PAIRS.teacher)),), r"'pairs\.0\.student_units' differs"),
        ((LayerPair(1, 3, PAIRS),), r"formula was .* layer 2 -> 1.* is .* layer 3 -> 1"),
        ((LayerPair(1, 2, PAIRS), LayerPair(1, 2, PAIRS)), "formula was"),
        ((LayerPair(1, 2, PAIRS, BASIS),), "formula was .* units .* is .* directions"),
    ],
)
def test_F18_other_units_layers_or_directions_are_refused(
    tmp_path: Path, layers: tuple[LayerPair, ...], name: str
) -> None:
    save_state(tmp_path, taught(LayerPair(1, 2, PAIRS)), MADE_OF)
    with pytest.raises(ArtifactError, match=name):
        check_state(tmp_path, taught(*layers), MADE_OF)


def test_F18_other_directions_of_the_same_number_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path, taught(LayerPair(1, 2, PAIRS, BASIS)), MADE_OF)
    with pytest.raises(ArtifactError, match=r"'pairs\.0\.teacher_basis' differs"):
        check_state(tmp_path, taught(LayerPair(1, 2, PAIRS, BASIS.roll(1, 1))), MADE_OF)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({**MADE_OF, "teacher": "two"}, "teacher was 'one' and is 'two' now"),
        ({"training.seed": "0"}, "teacher was 'one' and is 'None' now"),
        ({**MADE_OF, "data": "rows"}, "data was 'None' and is 'rows' now"),
    ],
)
def test_F18_another_origin_is_refused_with_both_values(tmp_path: Path, now: dict[str, str], message: str) -> None:
    save_state(tmp_path, taught(LayerPair(1, 2, PAIRS)), MADE_OF)
    with pytest.raises(ArtifactError, match=message):
        check_state(tmp_path, taught(LayerPair(1, 2, PAIRS)), now)


def test_R09_a_run_with_a_live_teacher_goes_on_with_the_same_engine_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    goal, engine = taught(LayerPair(1, 2, PAIRS)), {"precision": "bfloat16", "attention": "sdpa", "torch": "2.0"}
    save_state(tmp_path, goal, MADE_OF | engine)
    with pytest.raises(ArtifactError, match="precision was 'bfloat16' and is 'float32' now"):
        check_state(tmp_path, goal, MADE_OF | engine | {"precision": "float32"})
    check_state(tmp_path, goal, MADE_OF | engine | {"torch": "2.1"})
    assert "torch was '2.0' and is '2.1' now; the run continues" in caplog.text
    save_state(tmp_path, goal, MADE_OF)
    check_state(tmp_path, goal, MADE_OF | engine)
    assert "its engine was not written down: attention (now 'sdpa')" in caplog.text


def test_another_weight_is_another_objective(tmp_path: Path) -> None:
    save_state(tmp_path, taught(LayerPair(1, 2, PAIRS)), MADE_OF)
    with pytest.raises(ArtifactError, match=r"formula was 'loss = 1 \* cross_entropy.* is 'loss = 0\.5 \* cross"):
        check_state(tmp_path, taught(LayerPair(1, 2, PAIRS), weight=0.5), MADE_OF)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_damaged_state_is_refused_with_its_path(tmp_path: Path, damage: str) -> None:
    save_state(tmp_path, taught(LayerPair(1, 2, PAIRS)), MADE_OF)
    path = tmp_path / STATE_FILE
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"not tensors at all"}[damage])
    with pytest.raises(ArtifactError, match=rf"{STATE_FILE}: cannot be read"):
        check_state(tmp_path, taught(LayerPair(1, 2, PAIRS)), MADE_OF)


def test_K08_the_last_checkpoint_is_the_latest_that_is_whole(tmp_path: Path) -> None:
    """A run that is killed while it writes leaves a checkpoint without the state, which is written last."""
    assert last_checkpoint(tmp_path / "nothing") is None
    for step in (9, 11, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
        if step < 100:
            save_state(tmp_path / f"checkpoint-{step}", projecting(0), {})
    (tmp_path / "checkpoint-100" / f"{STATE_FILE}.partial").write_bytes(b"half")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-11"


def test_K08_an_interrupted_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, projecting(0), {"teacher": "one"})

    def interrupted(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("flexkd.training.checkpoint.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, projecting(1), {"teacher": "two"})
    with safe_open(tmp_path / STATE_FILE, "pt") as file:
        assert file.metadata()["teacher"] == "one"
