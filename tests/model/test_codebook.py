"""Online codebooks against a slow twin, in every dtype, and over two processes."""

import copy

import pytest
import torch
import torch.multiprocessing

from dinosr_hf import OnlineCodebooks, perplexity
from dinosr_hf.model.codebook_dinosr import REVIVAL_DISTANCE, USAGE_DECAY
from tolerances import CODEBOOK_COUNTS, CODEBOOK_SUMS, SAME_ARITHMETIC

NUM_CODEBOOKS, CODEBOOK_SIZE, HIDDEN_SIZE = 3, 9, 5


def fresh_codebooks(seed=0, revival_share=0.0):
    """Some codewords lie far from all frames, so that nothing falls on them, unless they are revived."""
    torch.manual_seed(seed)
    codebooks = OnlineCodebooks(NUM_CODEBOOKS, CODEBOOK_SIZE, HIDDEN_SIZE, revival_share)
    with torch.no_grad():
        codebooks.counts.uniform_(0.5, 4.0)
        codebooks.sums.copy_(codebooks.initial_sums() * codebooks.counts[..., None])
        codebooks.sums[:, -2:] += 100.0
    return codebooks


def frames(num_frames, seed):
    return torch.randn(NUM_CODEBOOKS, num_frames, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def learn(codebooks, micro_batches, decay):
    for targets in micro_batches:
        codebooks.accumulate(targets, codebooks.assign(targets))
    codebooks.commit(decay)


class SlowCodebooks:
    """The twin: one-hot vectors and loops, in float64; all of an optimizer step's frames at once."""

    def __init__(self, codebooks):
        self.sums = codebooks.sums.detach().double()
        self.counts = codebooks.counts.detach().double()
        self.usage = torch.ones_like(self.counts)

    def assign(self, targets):
        codes = []
        for sums, counts, table in zip(self.sums, self.counts, targets.double(), strict=True):
            distances = [[((frame - s / c) ** 2).sum() for s, c in zip(sums, counts, strict=True)] for frame in table]
            codes.append([min(range(len(row)), key=row.__getitem__) for row in distances])
        return torch.tensor(codes)

    def learn(self, targets, decay):
        codes = self.assign(targets)
        for i, (table, row) in enumerate(zip(targets.double(), codes, strict=True)):
            one_hot = torch.nn.functional.one_hot(row, len(self.counts[i])).double()  # (M, V)
            for code in range(len(self.counts[i])):
                hits = one_hot[:, code].sum()
                if hits > 0:
                    total = (one_hot[:, code, None] * table).sum(dim=0)
                    self.sums[i, code] = decay * self.sums[i, code] + (1 - decay) * total
                    self.counts[i, code] = decay * self.counts[i, code] + (1 - decay) * hits
                share = hits / len(table) * len(self.counts[i])
                self.usage[i, code] = USAGE_DECAY * self.usage[i, code] + (1 - USAGE_DECAY) * share

    def revive(self, revival_share):
        """How many codewords started anew."""
        number = 0
        for sums, counts, usage in zip(self.sums, self.counts, self.usage, strict=True):
            order = sorted(range(len(usage)), key=lambda code: usage[code].item())
            for unused, used in zip(order[: len(order) // 2], order[::-1], strict=False):
                if usage[unused] < revival_share and usage[used] > 2 * revival_share:
                    old, centre = sums[unused] / counts[unused], sums[used] / counts[used]
                    for values in (usage, counts, sums):
                        values[used] /= 2
                    usage[unused], counts[unused] = usage[used], counts[used]
                    sums[unused] = (centre + REVIVAL_DISTANCE * (old - centre)) * counts[unused]
                    number += 1
        return number


def assert_same_state(codebooks, twin):
    torch.testing.assert_close(codebooks.sums.detach().double(), twin.sums.double(), **CODEBOOK_SUMS)
    torch.testing.assert_close(codebooks.counts.detach().double(), twin.counts.double(), **CODEBOOK_COUNTS)


def test_steps_of_several_micro_batches_equal_the_slow_twin():
    codebooks = fresh_codebooks()
    twin = SlowCodebooks(codebooks)
    for step, sizes in enumerate([(17,), (4, 0, 13), (1, 1, 31), (2, 5)]):
        micro_batches = [frames(size, seed=10 * step + i) for i, size in enumerate(sizes)]
        whole = torch.cat(micro_batches, dim=1)
        assert torch.equal(codebooks.assign(whole), twin.assign(whole))
        learn(codebooks, micro_batches, decay=0.9 - 0.1 * step)
        twin.learn(whole, decay=0.9 - 0.1 * step)
        assert_same_state(codebooks, twin)


def test_a_commit_after_each_micro_batch_is_something_else():
    # the negative control of the test above
    once, each = fresh_codebooks(), fresh_codebooks()
    micro_batches = [frames(13, 1), frames(11, 2)]
    learn(once, micro_batches, 0.9)
    for targets in micro_batches:
        learn(each, [targets], 0.9)
    assert (once.counts - each.counts).abs().max() > 0.01


def test_assignment_uses_the_codebook_before_the_update():
    codebooks = fresh_codebooks()
    targets = frames(40, 3)
    before = codebooks.assign(targets)
    codebooks.accumulate(targets, before)
    assert torch.equal(codebooks.assign(targets), before)
    codebooks.commit(0.0)
    assert not torch.equal(codebooks.assign(targets), before)


def test_steps_held_back_are_one_step_with_the_frames_of_all():
    codebooks, twin = fresh_codebooks(), SlowCodebooks(fresh_codebooks())
    targets = [frames(20, seed) for seed in range(5)]
    for number, step in enumerate(targets[:4]):
        codebooks.accumulate(step[:, :7], codebooks.assign(step[:, :7]))
        codebooks.accumulate(step[:, 7:], codebooks.assign(step[:, 7:]))
        before = codebooks.sums.clone()
        codebooks.commit(0.7, is_due=number == 3)
        assert torch.equal(before, codebooks.sums) == (number < 3)
        assert (codebooks.held is None) == (number == 3)
    twin.learn(torch.cat(targets[:4], dim=1), 0.7)
    torch.testing.assert_close(codebooks.sums.double(), twin.sums, **CODEBOOK_SUMS)
    torch.testing.assert_close(codebooks.counts.double(), twin.counts, **CODEBOOK_COUNTS)


def test_a_discarded_step_leaves_those_before_it():
    codebooks, other = fresh_codebooks(), fresh_codebooks()
    for each in (codebooks, other):
        each.accumulate(frames(20, 0), each.assign(frames(20, 0)))
        each.commit(0.7, is_due=False)
    other.accumulate(frames(20, 1), other.assign(frames(20, 1)))
    other.discard()
    for each in (codebooks, other):
        each.commit(0.7)
    assert torch.equal(codebooks.sums, other.sums) and torch.equal(codebooks.counts, other.counts)


def test_codewords_that_nothing_falls_on_stay():
    codebooks = fresh_codebooks()
    sums, counts = codebooks.sums.clone(), codebooks.counts.clone()
    targets = frames(6, 4)
    codes = codebooks.assign(targets)
    learn(codebooks, [targets], 0.5)
    for i in range(NUM_CODEBOOKS):
        hit = torch.zeros(CODEBOOK_SIZE, dtype=torch.bool).index_fill_(0, codes[i], True)
        assert hit.any() and not hit[-2:].any()
        assert torch.equal(codebooks.sums[i, ~hit], sums[i, ~hit])
        assert torch.equal(codebooks.counts[i, ~hit], counts[i, ~hit])
        assert (codebooks.counts[i, hit] != counts[i, hit]).all()


def test_revival_equals_the_slow_twin():
    codebooks = fresh_codebooks(revival_share=0.45)
    twin, numbers = SlowCodebooks(codebooks), []
    for step in range(12):
        targets = frames(40, step)
        assert torch.equal(codebooks.assign(targets), twin.assign(targets))
        learn(codebooks, [targets[:, :9], targets[:, 9:]], decay=0.8)
        twin.learn(targets, decay=0.8)
        numbers.append(twin.revive(0.45))
        assert_same_state(codebooks, twin)
        torch.testing.assert_close(codebooks.usage.detach().double(), twin.usage, **CODEBOOK_COUNTS)
    assert 0 in numbers and max(numbers) > 2


def in_use(revival_share):
    """How many of 8 codewords take frames at the end, where the frames are 8 heaps and the codewords start far off."""
    codebooks = OnlineCodebooks(1, 8, 4, revival_share)
    generator = torch.Generator().manual_seed(0)
    heaps = 5 * torch.randn(8, 4, generator=generator)
    with torch.no_grad():
        codebooks.sums.copy_(20 + torch.randn(1, 8, 4, generator=generator))
    for _ in range(150):
        targets = heaps[torch.randint(8, (64,), generator=generator)] + 0.3 * torch.randn(64, 4, generator=generator)
        learn(codebooks, [targets[None]], 0.9)
    return len(codebooks.assign(heaps[None]).unique())


def test_revival_brings_all_codewords_into_use():
    assert in_use(0.1) == 8
    assert in_use(0.0) < 4  # the negative control: as in the paper


def test_revival_leaves_codewords_in_even_use_to_the_last_digit():
    plain, reviving = fresh_codebooks(), fresh_codebooks(revival_share=0.01)
    for step in range(4):
        learn(plain, [frames(30, step)], 0.9)
        learn(reviving, [frames(30, step)], 0.9)
    assert torch.equal(plain.sums, reviving.sums) and torch.equal(plain.counts, reviving.counts)


@pytest.mark.parametrize("micro_batches", [[], [frames(0, 0)], [frames(8, 5)]], ids=["none", "empty", "some"])
def test_what_changes_nothing(micro_batches):
    has_frames = bool(micro_batches) and micro_batches[0].shape[1] > 0
    decay = 1.0 if has_frames else 0.3
    codebooks = fresh_codebooks(revival_share=0.0 if has_frames else 0.1)
    state = copy.deepcopy(codebooks.state_dict())
    learn(codebooks, micro_batches, decay)
    assert all(torch.equal(tensor, state[name]) for name, tensor in codebooks.state_dict().items())


def test_a_commit_is_not_repeated():
    codebooks = fresh_codebooks()
    learn(codebooks, [frames(8, 5)], 0.9)
    counts = codebooks.counts.clone()
    codebooks.commit(0.9)
    assert torch.equal(codebooks.counts, counts)


def test_state_is_sums_and_counts_without_gradient():
    codebooks = fresh_codebooks()
    learn(codebooks, [frames(8, 5)], 0.9)
    assert set(codebooks.state_dict()) == {"sums", "counts"}
    assert not any(parameter.requires_grad for parameter in codebooks.parameters())


def test_revival_begins_and_ends_with_the_state_of_the_other():
    plain, reviving = fresh_codebooks(), fresh_codebooks(seed=1, revival_share=0.1)
    learn(reviving, [frames(8, 5)], 0.9)
    state = reviving.state_dict()
    plain.load_state_dict(state)
    assert set(plain.state_dict()) == {"sums", "counts"} and "usage" in state
    assert torch.equal(plain.sums, reviving.sums)
    assert (reviving.usage != 1).any()
    reviving.load_state_dict(plain.state_dict())
    assert torch.equal(reviving.usage, torch.ones_like(reviving.counts))
    with pytest.raises(RuntimeError, match="counts"):  # all else must be there
        reviving.load_state_dict({"sums": plain.sums})


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "double": lambda module: module.double(),
    "deepcopy": copy.deepcopy,
    "half-and-back": lambda module: module.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_float32_is_kept_to_the_last_digit(cast):
    outer = torch.nn.Sequential(torch.nn.Linear(2, 2), fresh_codebooks())
    sums, counts = outer[1].sums.clone(), outer[1].counts.clone()
    moved = cast(outer)[1]
    assert moved.sums.dtype == moved.counts.dtype == torch.float32
    assert torch.equal(moved.sums, sums) and torch.equal(moved.counts, counts)
    assert not any(parameter.requires_grad for parameter in moved.parameters())
    targets = frames(12, 6)
    assert torch.equal(moved.assign(targets.to(torch.bfloat16)), moved.assign(targets.to(torch.bfloat16).float()))


def test_deepcopy_is_independent():
    codebooks = fresh_codebooks()
    sums = codebooks.sums.clone()
    learn(copy.deepcopy(codebooks), [frames(8, 5)], 0.1)
    assert torch.equal(codebooks.sums, sums)


def test_from_the_meta_device():
    with torch.device("meta"):
        codebooks = OnlineCodebooks(NUM_CODEBOOKS, CODEBOOK_SIZE, HIDDEN_SIZE)
    codebooks = codebooks.to(torch.bfloat16).to_empty(device="cpu")
    assert codebooks.sums.dtype == codebooks.counts.dtype == torch.float32
    codebooks.load_state_dict(fresh_codebooks().state_dict())
    learn(codebooks, [frames(8, 5)], 0.9)
    other = fresh_codebooks()
    learn(other, [frames(8, 5)], 0.9)
    assert torch.equal(codebooks.sums, other.sums)


def test_first_codewords_are_normalised_over_each_codebook():
    torch.manual_seed(0)
    codewords = OnlineCodebooks(2, 33, 17).initial_sums()
    assert codewords.shape == (2, 33, 17)
    torch.testing.assert_close(codewords.mean(dim=1), torch.zeros(2, 17), **SAME_ARITHMETIC)
    # the epsilon of 1e-5 takes half of that from a variance near one
    torch.testing.assert_close(codewords.var(dim=1, correction=0), torch.ones(2, 17), atol=5e-5, rtol=0.0)
    assert (codewords[0] - codewords[1]).abs().max() > 0.5


@pytest.mark.parametrize(
    ("histogram", "expected"),
    [
        pytest.param([5, 5, 5, 5], 4.0, id="all-alike"),
        pytest.param([0, 7, 0, 0], 1.0, id="one-takes-all"),
        pytest.param([3, 0, 3, 0], 2.0, id="two-alike"),
        pytest.param([0, 0, 0, 0], 1.0, id="empty"),
        pytest.param([2, 1, 1, 0], 2**1.5, id="half-quarter-quarter"),
    ],
)
def test_perplexity_worked_out_by_hand(histogram, expected):
    assert perplexity(torch.tensor(histogram)).item() == pytest.approx(expected, rel=1e-5)
    both = perplexity(torch.tensor([histogram, [1, 1, 0, 0]]))
    assert both.tolist() == pytest.approx([expected, 2.0], rel=1e-5)


def out_of_use():
    """Two codewords of each codebook are so near to a revival that the next commit brings it."""
    codebooks = fresh_codebooks(revival_share=0.1)
    with torch.no_grad():
        codebooks.usage[:, -2:] = 0.1
    return codebooks


def learn_in_a_process(rank, folder):
    """Two steps: in the first each process has frames, in the second only the first has."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    codebooks = out_of_use()
    learn(codebooks, [frames(21, 1)[:, rank::2]], 0.9)
    states = [copy.deepcopy(codebooks.state_dict())]
    learn(codebooks, [frames(15, 2)] if rank == 0 else [], 0.8)
    states.append(codebooks.state_dict())
    torch.save(states, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_learn_what_one_does(tmp_path):
    # forked: a spawned process would import transformers, which takes longer than all else in this file
    torch.multiprocessing.start_processes(learn_in_a_process, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = out_of_use()
    before = alone.sums[:, -2:].clone()
    for step, (targets, decay) in enumerate([(frames(21, 1), 0.9), (frames(15, 2), 0.8)]):
        learn(alone, [targets], decay)
        for name in ("sums", "counts", "usage"):
            assert torch.equal(first[step][name], second[step][name])
        torch.testing.assert_close(first[step]["sums"], alone.sums.data, **CODEBOOK_SUMS)
        torch.testing.assert_close(first[step]["counts"], alone.counts.data, **CODEBOOK_COUNTS)
        torch.testing.assert_close(first[step]["usage"], alone.usage.data, **CODEBOOK_COUNTS)
    assert (alone.sums[:, -2:] - before).abs().amin() > 1  # all were revived
    # the negative control: half of the frames are another codebook
    half = out_of_use()
    learn(half, [frames(21, 1)[:, ::2]], 0.9)
    assert (half.counts - first[0]["counts"]).abs().max() > 0.01
