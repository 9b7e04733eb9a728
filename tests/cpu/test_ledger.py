"""What is sent again after a death, and who is blamed for several, without processes."""

import random

import pytest

from miniinfer.data import Add, SamplingParams
from miniinfer.engine.ledger import PROOF, Ledger


def opened(*names: str) -> Ledger:
    ledger = Ledger()
    for name in names:
        ledger.open(name, [Add(name, [1, 2], SamplingParams(max_tokens=100))])
    return ledger


def sent(ledger: Ledger) -> list[str]:
    return [add.id for adds in ledger.due() for add in adds]


def test_everything_is_sent_once_and_again_after_a_death_with_its_output() -> None:
    ledger = opened("a", "b")
    assert sent(ledger) == ["a", "b"] and sent(ledger) == []
    ledger.produced("a", [5, 6])
    ledger.produced("unknown", [1])
    assert ledger.died() == []
    ledger.open("c", [Add("c", [1], SamplingParams())])
    again = [add for adds in ledger.due() for add in adds]
    assert [(add.id, add.prompt, add.output) for add in again] == [("a", [1, 2], [5, 6]), ("b", [1, 2], []), ("c", [1], [])]
    ledger.close(["a", "b", "c", "unknown"])
    assert not ledger and ledger.died() == [] and sent(ledger) == []


def test_siblings_go_on_as_those_that_are_left() -> None:
    params = SamplingParams(n=3, prompt_logprobs=2, max_tokens=9, min_tokens=4)
    ledger = Ledger()
    ledger.open("r", [Add(f"r#{i}", [1], params, group="r", seed=i) for i in range(3)])
    ledger.due()
    ledger.produced("r#2", [8])
    ledger.close(["r#0"])
    ledger.died()
    (again,) = ledger.due()
    assert [(a.id, a.seed, a.params.n, a.params.prompt_logprobs) for a in again] == [("r#1", 1, 2, 2), ("r#2", 2, 2, None)]
    assert all((a.params.max_tokens, a.params.min_tokens, a.group) == (9, 4, "r") for a in again)
    assert params.n == 3  # the caller's own are as they were


@pytest.mark.parametrize("seed", range(20))
def test_the_poison_is_found_whatever_its_company(seed: int) -> None:
    """A process dies whenever one of the bad ones has it: each is blamed, nobody else is, and all the others end."""
    rng = random.Random(seed)
    names = [f"r{i}" for i in range(rng.randint(1, 12))]
    bad = set(rng.sample(names, min(len(names), rng.randint(0, 3))))
    ledger, running, left, blamed, deaths = opened(*names), set(), {name: 40 for name in names}, [], 0
    for _ in range(10_000):
        running |= set(sent(ledger))
        if running & bad:
            deaths += 1
            found = ledger.died()
            assert len(found) <= 1
            blamed += found
            ledger.close(found)
            bad -= set(blamed)
            running = set()
            continue
        for name in sorted(running):
            ledger.produced(name, [1])
            left[name] -= 1
            if not left[name]:
                ledger.close([name])
                running.discard(name)
                del left[name]
        if not ledger:
            break
    assert not ledger and not bad and set(left) == set(blamed)
    assert deaths == (2 + len(blamed) if blamed else 0)


def test_a_death_after_the_trials_blames_nobody() -> None:
    ledger = opened("a", "b")
    for _ in range(2):
        ledger.due()
        assert ledger.died() == []
    assert sent(ledger) == ["a"] and sent(ledger) == []
    ledger.produced("a", [1] * PROOF)
    assert sent(ledger) == ["b"]
    ledger.produced("b", [1] * PROOF)
    assert sent(ledger) == []
    ledger.open("new", [Add("new", [1], SamplingParams())])
    assert sent(ledger) == ["new"]
    assert ledger.died() == []
