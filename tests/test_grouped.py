"""Gradients of many parameters in one launch, in the Triton interpreter, and what waits for a launch."""

import pytest
import torch

from memformer_kernels.gradient_sink import PutOff, open_sink, put_off

pytest.importorskip("triton")

from memformer_kernels import gradient_sink
from memformer_kernels.layers.fused import grouped

F32, F16 = torch.float32, torch.float16
SHAPES = [(8, 8), (24, 136), (200, 144), (128, 128), (264, 40)]


def products(rows, shapes=SHAPES):
    return [
        (torch.randn(rows, n, dtype=F16), torch.randn(rows, k, dtype=F16), torch.randn(n, k, dtype=F32))
        for n, k in shapes
    ]


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
@pytest.mark.parametrize("count", [1, len(SHAPES)])
def test_products(rows, count):
    problems = products(rows, SHAPES[-count:])
    expected = [total.double() + grad.double().t() @ x.double() for grad, x, total in problems]
    grouped.products(problems)
    for (_, _, total), e in zip(problems, expected, strict=True):
        assert (total - e).abs().max() <= 2e-6 * rows


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("rows", [1, 255, 300])
def test_column_sums(rows, dtype):
    pairs, wide = torch.randn(rows, 2, 40, dtype=dtype), torch.randn(rows, 72, dtype=dtype)
    problems = [(x, torch.randn(x.shape[1])) for x in (pairs[:, 0], pairs[:, 1], wide)]
    expected = [total.double() + x.double().sum(0) for x, total in problems]
    grouped.column_sums(problems)
    for (_, total), e in zip(problems, expected, strict=True):
        assert (total - e).abs().max() <= 1e-6 * rows


def test_totals_are_their_own_in_every_grouping():
    problems = products(70)
    again = [(grad, x, total.clone()) for grad, x, total in problems]
    grouped.products(problems)
    for problem in reversed(again):
        grouped.products([problem])
    for (*_, a), (*_, b) in zip(problems, again, strict=True):
        assert torch.equal(a, b)


class Calls(list):
    __hash__ = object.__hash__

    def __call__(self, problems):
        self.append([int(terms[0, 0]) for terms, _ in problems])


@pytest.fixture
def waiting():
    return PutOff(), Calls()


def numbered(number, rows=1):
    return torch.full((rows, 8), float(number)), torch.zeros(8)


def test_problems_are_grouped_by_what_runs_them_their_rows_and_dtype(waiting):
    put, first = waiting
    second, totals = Calls(), []
    for number, (run, rows, dtype) in enumerate(
        [(first, 1, F32), (second, 1, F32), (first, 2, F32), (first, 1, F16), (first, 1, F32), (second, 1, F32)]
    ):
        terms, total = numbered(number, rows)
        totals.append(total)  # a total that is gone would lend its address to the next
        put.add(run, terms.to(dtype), total)
    assert first == second == []
    put.do()
    assert (sorted(first), second) == ([[0, 4], [2], [3]], [[1, 5]])
    put.do()
    assert len(first) == 3 and len(second) == 1


def test_devices_are_kept_apart(waiting):
    put, _ = waiting
    seen = []
    for device in ("cpu", "meta", "cpu"):
        put.add(seen.append, torch.zeros(2, 8, device=device), torch.zeros(8, device=device))
    put.do()
    assert sorted([total.device.type for _, total in problems] for problems in seen) == [["cpu", "cpu"], ["meta"]]


def test_a_total_is_added_to_in_order(waiting):
    put, run = waiting
    terms, total = numbered(0)
    for number in range(3):
        put.add(run, torch.full_like(terms, number), total)
    put.do()
    assert run == [[0], [1], [2]]


def test_launches_hold_so_many_problems_and_no_more(waiting, monkeypatch):
    put, run = waiting
    monkeypatch.setattr(gradient_sink, "MOST_PROBLEMS", 3)
    kept = [numbered(number) for number in range(7)]
    for problem in kept:
        put.add(run, *problem)
    put.do()
    assert run == [[0, 1, 2], [3, 4, 5], [6]]


def test_what_waits_is_bounded(waiting, monkeypatch):
    put, run = waiting
    monkeypatch.setattr(gradient_sink, "MOST_BYTES", 2 * 8 * 4)
    kept = [numbered(number) for number in range(5)]
    for problem in kept:
        put.add(run, *problem)
    assert run == [[0, 1], [2, 3]]


class Sink:
    def takes(self, parameter):
        return True

    def add(self, parameters, make):
        raise NotImplementedError


def test_the_sink_is_closed_with_nothing_waiting():
    run = Calls()
    inner, outer = numbered(1), numbered(2)
    with open_sink(Sink()):
        put_off(run, *outer)
        with open_sink(Sink()):
            put_off(run, *inner)
        assert run == [[1]]
    assert run == [[1], [2]]


def test_after_an_error_nothing_is_added():
    run = Calls()
    problem = numbered(1)
    with pytest.raises(ZeroDivisionError), open_sink(Sink()):
        put_off(run, *problem)
        raise ZeroDivisionError
    with open_sink(Sink()):
        pass
    assert run == []


def test_what_may_wait(monkeypatch):
    grad, x, total = products(4, [(16, 24)])[0]
    assert grouped.product_takes(grad, x, total)
    with monkeypatch.context() as changed:
        changed.setattr(grouped, "MOST_WORK", 4 * 16 * 24 - 1)
        assert not grouped.product_takes(grad, x, total)
    assert not grouped.product_takes(grad.float(), x.float(), total)
    assert not grouped.product_takes(grad, x.bfloat16(), total)
    assert not grouped.product_takes(grad, x, total.double())  # of a float64 parameter under autocast
    assert not grouped.product_takes(grad[:, 8:], x, total[8:])  # not contiguous
    assert not grouped.product_takes(grad[:0], x[:0], total)
    odd = torch.randn(4, 12, dtype=F16)
    assert not grouped.product_takes(odd, x, torch.zeros(12, 24))
    shifted = torch.randn(4 * 16 + 4, dtype=F16)[4:].view(4, 16)
    assert not grouped.product_takes(shifted, x, total)

    terms, sums = torch.randn(6, 2, 16), [torch.zeros(16), torch.zeros(16)]
    assert grouped.sums_take(terms, sums)
    assert not grouped.sums_take(terms, [sums[0], None])  # the other is returned
    assert not grouped.sums_take(terms, [s.double() for s in sums])
    assert not grouped.sums_take(terms[..., :8], [s[:8] for s in sums])
    assert not grouped.sums_take(terms.mT, [torch.zeros(2)] * 16)
    assert not grouped.sums_take(terms[:0], sums)
    assert not grouped.sums_take(torch.randn(6, 1, 20), [torch.zeros(20)])
