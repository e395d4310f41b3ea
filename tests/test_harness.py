"""The ground the tests stand on holds: closeness, the closed network, the same start."""

import os
import socket

import pytest
import torch
from jaxtyping import Float, TypeCheckError

from flexkd.core.objective import Signal
from flexkd.core.scores import label_values
from tests.closeness import TOLERANCES, assert_close
from tests.conftest import LONGEST, TOGETHER, NetworkError, modules_with_shapes
from tests.shape_checks import checked
from tests.source_tree import ROOT


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_closeness_sees_what_lies_beyond_the_tolerance(dtype: torch.dtype) -> None:
    expected = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    relative, absolute = TOLERANCES[dtype]
    assert max(relative, absolute) <= 5e-2
    assert_close(expected * (1 + relative / 2), expected, dtype=dtype)
    with pytest.raises(AssertionError, match="Mismatched elements: 1 / 3"):
        assert_close(expected + torch.tensor([0.0, 0.0, 2 * absolute]), expected, dtype=dtype)


def test_closeness_takes_the_coarser_dtype_and_keeps_integers_exact() -> None:
    assert_close(torch.tensor(1.000001), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(1.000001, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_close(1.000001, 1.0)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1_000_000]), torch.tensor([1_000_001]))
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.zeros(2), torch.zeros(3))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor(float("nan")), torch.tensor(float("nan")))


@pytest.mark.parametrize("connect", ["connect", "connect_ex"])
@pytest.mark.parametrize("address", ["192.0.2.1", "example.invalid"])
def test_the_network_is_closed(connect: str, address: str) -> None:
    with socket.socket() as connection, pytest.raises(NetworkError, match=address):
        getattr(connection, connect)((address, 80))


def test_this_machine_stays_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_the_hub_is_offline_before_anything_reads_it() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert os.environ["HF_HOME"] == constants.HF_HOME


class TestSameStart:
    """Two tests that draw the same number, whatever the first one left behind."""

    drawn: torch.Tensor

    def test_first(self) -> None:
        type(self).drawn = torch.rand(3)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(2)

    def test_second(self) -> None:
        assert torch.equal(torch.rand(3), self.drawn)
        assert torch.get_num_threads() == 1


def test_shapes_are_checked_at_every_call_where_they_are_written() -> None:
    with pytest.raises(TypeCheckError, match="label_values"):
        label_values(torch.zeros(3), torch.zeros(3, dtype=torch.long), target="logit")
    assert "flexkd.core.scores" in modules_with_shapes()
    assert "flexkd.cli" not in modules_with_shapes()


def test_what_names_no_shape_is_left_as_it_is() -> None:
    """Also a function that is made anew at every call, for which a check would be made anew as well."""

    def plain(value: int) -> list[int]:
        return [value]

    def shaped(values: list[Float[torch.Tensor, " rows"]] | None) -> int:
        return 0 if values is None else len(values)

    def summed(
        first: Float[torch.Tensor, "rows units"], second: Float[torch.Tensor, " rows"]
    ) -> Float[torch.Tensor, " rows"]:
        return first.sum(0) + 0 * second.sum()

    assert checked(summed)(torch.zeros(3, 3), torch.zeros(3)).shape == (3,)
    for shape, rows, message in (((3, 3), 2, "second"), ((3, 2), 3, "return")):
        with pytest.raises(TypeCheckError, match=message):
            checked(summed)(torch.zeros(shape), torch.zeros(rows))
    assert checked(plain) is plain
    with pytest.raises(TypeCheckError, match="values"):
        checked(shaped)([torch.zeros(2, 2)])
    assert checked(shaped)([torch.zeros(2)]) == 1
    with pytest.raises(TypeCheckError, match="features"):
        Signal(features=(torch.zeros(2),))


def test_modules_that_start_first_are_there() -> None:
    assert [module for module in (*LONGEST, *TOGETHER) if not (ROOT / module).is_file()] == []
