"""ASIF: scores of a dense oracle, anchors in any blocks or on two processes, shares, edits, faiss."""

import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import vlmkernels
from tests.two_processes import on_two_processes
from vlmkernels.models import ASIF, AnchorFolder, AnchorTensors
from vlmkernels.models.parts import nearest

WIDTHS = 24, 10


def dense(x, anchors, k, p):
    """The definition: matmul, topk, scatter, clamp, power, normalise."""
    cosines = F.normalize(x.double(), dim=1) @ F.normalize(anchors.double(), dim=1).T
    kept = cosines.topk(min(k, len(anchors)), dim=1)
    sparse = torch.zeros_like(cosines).scatter(1, kept.indices, kept.values)
    return F.normalize(sparse.clamp_min(0).pow(p), dim=1)


def oracle(images, texts, anchors, k, p):
    return dense(images, anchors[0], k, p) @ dense(texts, anchors[1], k, p).T


def draw(count, queries=7, seed=0):
    """Anchors whose images and texts have something in common, and queries of both."""
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(count + queries, 8, generator=rng)
    sides = [
        (
            common @ torch.randn(8, width, generator=rng)
            + 0.3 * torch.randn(count + queries, width, generator=rng)
        )
        for width in WIDTHS
    ]
    return [side[:count] for side in sides], [side[count:] for side in sides]


class InBlocks:
    """Some tensors as the blocks of an anchor set."""

    def __init__(self, anchors, *sizes):
        self.parts = list(zip(*(side.split(list(sizes)) for side in anchors), strict=True))

    def blocks(self):
        return self.parts

    def describe(self, index):
        return f"image {index}", f"text {index}"


@pytest.mark.parametrize(
    ("count", "k", "p"), [(60, 20, 8.0), (60, 800, 8.0), (60, 1, 3.0), (5, 4, 1.5), (1, 1, 8.0)]
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_scores_are_those_of_a_dense_oracle(count, k, p, blocks):
    anchors, queries = draw(count)
    sizes = [count] if blocks == 1 else [count // 3, 0, count - count // 3]
    found = ASIF(None, None, InBlocks(anchors, *sizes), k=k, p=p).similarity(*queries)
    wanted = oracle(*queries, anchors, k, p)
    assert found.shape == (7, 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.max() > 0.1


def test_float64_is_exact_to_rounding():
    anchors, queries = draw(50)
    anchors, queries = ([x.double() for x in part] for part in (anchors, queries))
    found = ASIF(None, None, InBlocks(anchors, 20, 30), k=15).similarity(*queries)
    torch.testing.assert_close(found, oracle(*queries, anchors, 15, 8), rtol=1e-12, atol=1e-14)


def test_negative_cosines_count_nothing_and_equal_ones_keep_the_first():
    anchors = torch.tensor([[1.0, 0], [-1, 0], [1, 0], [1, 0]]), torch.eye(4)
    asif = ASIF(None, None, InBlocks(anchors, 1, 2, 1), k=2)
    rep = asif.encode_images(torch.tensor([[2.0, 0], [-1, 0], [0, 1]]))
    assert rep.indices.tolist()[0] == [0, 2]
    torch.testing.assert_close(rep.values[0], torch.full((2,), 0.5).sqrt())
    torch.testing.assert_close(rep.dense(4)[1], torch.tensor([0.0, 1, 0, 0]))
    assert not rep.values[2].any()
    whole = ASIF(None, None, AnchorTensors(*anchors), k=2).encode_images(torch.tensor([[2.0, 0]]))
    assert whole.indices.tolist() == [[0, 2]]


def test_a_folder_gives_what_its_tensors_give_and_an_anchor_less_changes_what_the_oracle_says(tmp_path):
    anchors, queries = draw(40)
    names = [str(i) for i in range(40)]
    folder = AnchorFolder.create(tmp_path, image_width=WIDTHS[0], text_width=WIDTHS[1])
    for part in (slice(0, 30), slice(30, 33), slice(33, 40)):
        folder.add(*(side[part] for side in anchors), names[part], names[part])
    asif = ASIF(None, None, folder, k=12)
    in_memory = ASIF(None, None, AnchorTensors(*anchors), k=12).similarity(*queries)
    torch.testing.assert_close(asif.similarity(*queries), in_memory, rtol=1e-4, atol=1e-6)
    before = oracle(*queries, anchors, 12, 8)
    best = asif.explain(queries[0][0], queries[1][0], 1).parts[0]
    folder.remove([(best.name, best.caption)])
    kept = [i for i in range(40) if i != best.index]
    after = oracle(*queries, [side[kept] for side in anchors], 12, 8)
    torch.testing.assert_close(asif.similarity(*queries).double(), after, rtol=1e-4, atol=1e-6)
    assert (before - after)[0, 0].abs() > 0.05
    folder.add(*(side[best.index : best.index + 1] for side in anchors), [best.name], [best.caption])
    torch.testing.assert_close(asif.similarity(*queries).double(), before, rtol=1e-4, atol=1e-6)


def test_encoders_are_called_with_the_items():
    anchors, queries = draw(30)
    table = dict(zip("abcdefg", queries[1], strict=True))
    asif = ASIF(lambda rows: queries[0][list(rows)], lambda texts: torch.stack([table[t] for t in texts]),
                AnchorTensors(*anchors), k=9)  # fmt: skip
    wanted = asif.similarity(*queries)
    assert torch.equal(asif.similarity(range(7), "abcdefg"), wanted)
    texts = asif.encode_texts("abc")
    torch.testing.assert_close(asif.similarity(queries[0], texts), wanted[:, :3], rtol=1e-4, atol=1e-6)


def test_a_class_is_the_best_of_its_texts():
    anchors, (images, _) = draw(50)
    rng = torch.Generator().manual_seed(1)
    texts = {
        f"{article} {name}": torch.randn(WIDTHS[1], generator=rng)
        for name in "xyz"
        for article in ("a", "the")
    }
    asif = ASIF(None, lambda given: torch.stack([texts[t] for t in given]), AnchorTensors(*anchors), k=20)
    found = asif.classify(images, ["x", "y", "z"], ["a {}", "the {}"])
    each = oracle(images, torch.stack(list(texts.values())), anchors, 20, 8)
    torch.testing.assert_close(found.double(), each.view(7, 3, 2).amax(2), rtol=1e-4, atol=1e-6)


def test_shares_are_the_products_of_the_oracle_and_add_up():
    anchors, (images, texts) = draw(60)
    told = AnchorTensors(*anchors, [f"i{j}" for j in range(60)], [f"t{j}" for j in range(60)])
    asif = ASIF(None, None, told, k=25)
    found = asif.explain(images[0], texts[0], 100)
    products = dense(images[:1], anchors[0], 25, 8)[0] * dense(texts[:1], anchors[1], 25, 8)[0]
    assert found.score == pytest.approx(products.sum().item(), rel=1e-4)
    assert found.anchors == len(found.parts) == int((products > 0).sum())
    assert sum(part.share for part in found.parts) == pytest.approx(1, rel=1e-5)
    for part in found.parts:
        assert (part.name, part.caption) == (f"i{part.index}", f"t{part.index}")
        assert part.share == pytest.approx((products[part.index] / products.sum()).item(), rel=1e-3, abs=1e-7)
        assert part.image_value * part.text_value == pytest.approx(
            part.share * found.score, rel=1e-4, abs=1e-9
        )
    shares = [part.share for part in found.parts]
    assert shares == sorted(shares, reverse=True)
    assert asif.explain(images[0], texts[0], 2).parts == found.parts[:2]
    alone = asif.explain(text=texts[0], count=100)
    assert alone.score == pytest.approx(1, rel=1e-5)
    assert {part.index for part in alone.parts} == set(
        dense(texts[:1], anchors[1], 25, 8)[0].nonzero()[:, 0].tolist()
    )


def test_nothing_in_common():
    asif = ASIF(None, None, AnchorTensors(torch.eye(2), torch.eye(2)), k=1)
    found = asif.explain(torch.tensor([1.0, 0]), torch.tensor([0, 1.0]))
    assert (found.score, found.parts, found.anchors) == (0.0, [], 0)
    none = ASIF(None, None, InBlocks((torch.zeros(0, 2), torch.zeros(0, 2)), 0))
    assert none.similarity(torch.ones(3, 2), torch.ones(2, 2)).tolist() == [[0.0, 0.0]] * 3


def test_errors_name_the_arguments():
    anchors, (images, texts) = draw(10)
    with pytest.raises(
        ValueError, match=r"k must be at least 1, got 0; p must be .* got 0; search must be one of"
    ):
        ASIF(None, None, AnchorTensors(*anchors), k=0, p=0, search="hnsw")
    asif = ASIF(None, None, AnchorTensors(*anchors))
    with pytest.raises(ValueError, match=r"image_encoder must be given for images that are not features"):
        asif.similarity(["a"], texts)
    with pytest.raises(ValueError, match=r"features of images must be floating \[N, 24\].* got .*\[7, 10\]"):
        asif.similarity(texts, texts)
    with pytest.raises(ValueError, match=r"features of texts must be floating \[N, 10\].* got .*\[10\]"):
        asif.similarity(images, texts[0])
    with pytest.raises(ValueError, match=r"templates must each have a \{\} .* got \['a dog'\]"):
        asif.classify(images, ["x"], ["a dog"])
    with pytest.raises(ValueError, match="classes must not be empty"):
        asif.classify(images, [])
    with pytest.raises(ValueError, match="got one text"):
        asif.classify(images, "cat")
    with pytest.raises(ValueError, match="image or text must be given, got neither; count must be"):
        asif.explain(count=0)


def score_parts(rank, folder):
    """Each rank has a part of the anchors; of the third case rank 1 has none."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = []
    for first in (23, 3, 40):
        anchors, queries = draw(40)
        own = [side[first:] if rank else side[:first] for side in anchors]
        told = [f"{j + rank * first}" for j in range(len(own[0]))]
        asif = ASIF(None, None, AnchorTensors(*own, told, told), k=12, group=dist.group.WORLD)
        parts = asif.explain(queries[0][0], queries[1][0], 5).parts
        found.append([asif.similarity(*queries), torch.tensor([[p.index, int(p.name)] for p in parts])])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path):
    anchors, queries = draw(40)
    asif = ASIF(None, None, AnchorTensors(*anchors), k=12)
    wanted = asif.similarity(*queries)
    chosen = [part.index for part in asif.explain(queries[0][0], queries[1][0], 5).parts]
    for rank in on_two_processes(score_parts, tmp_path):
        for scores, told in rank:
            torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-7)
            assert told.tolist() == [[index, index] for index in chosen]


def faiss_stand_in(made):
    """An inverted file as faiss has it: rows by their nearest centre, of which `nprobe` are searched."""

    class Index:
        def __init__(self, width, text, metric):
            assert metric == "inner product"
            name, lists = text.removesuffix(",Flat")[:3], int(text.removesuffix(",Flat")[3:])
            assert name == "IVF"
            self.nlist, self.nprobe, self.width = lists, 1, width
            self.rows = torch.zeros(0, width)
            made.append(self)

        def train(self, rows):
            assert len(rows) >= self.nlist
            assert rows.dtype.name == "float32"
            self.centres = torch.from_numpy(rows[: self.nlist])

        def add(self, rows):
            self.rows = torch.cat([self.rows, torch.from_numpy(rows)])

        def search(self, rows, k):
            query = torch.from_numpy(rows)
            lists = (self.rows @ self.centres.T).argmax(1)
            probed = (query @ self.centres.T).topk(self.nprobe, dim=1).indices
            seen = (lists[None, :, None] == probed[:, None, :]).any(2)
            found = (query @ self.rows.T).masked_fill(~seen, -torch.inf).topk(k, dim=1)
            absent = found.values == -torch.inf
            return found.values.masked_fill(absent, -3e38).numpy(), found.indices.masked_fill(
                absent, -1
            ).numpy()

    return types.SimpleNamespace(METRIC_INNER_PRODUCT="inner product", index_factory=Index, __version__="0")


@pytest.fixture
def faiss(monkeypatch):
    made = []
    monkeypatch.setitem(sys.modules, "faiss", faiss_stand_in(made))
    return made


def test_faiss_of_a_small_set_is_exact_and_made_once(faiss):
    anchors, queries = draw(300)
    asif = ASIF(None, None, InBlocks(anchors, 100, 200), k=40, search="faiss")
    wanted = ASIF(None, None, AnchorTensors(*anchors), k=40).similarity(*queries)
    for _ in range(2):
        torch.testing.assert_close(asif.similarity(*queries), wanted, rtol=1e-4, atol=1e-6)
    assert [(index.nlist, len(index.rows)) for index in faiss] == [(7, 300), (7, 300)]
    asif.anchors = InBlocks(anchors, 300)
    asif.encode_images(queries[0])
    assert len(faiss) == 3


def test_faiss_may_find_fewer(faiss, monkeypatch):
    """Where its lists have too few, what is absent adds nothing."""
    monkeypatch.setattr(nearest.Faiss, "LEAST_LISTS", 1)
    monkeypatch.setattr(nearest.Faiss, "PER_RESULT", 0)
    anchors, queries = draw(300)
    asif = ASIF(None, None, AnchorTensors(*anchors), k=200, search="faiss")
    rep = asif.encode_images(queries[0])
    absent = rep.indices >= nearest.ABSENT
    assert absent.any()
    assert not rep.values[absent].any()
    scores = asif.similarity(*queries)
    assert ((scores >= 0) & (scores <= 1.0001)).all()
    assert all(part.index < 300 for part in asif.explain(queries[0][0], queries[1][0]).parts)


def test_info_names_faiss_as_what_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    said = vlmkernels.info()["notes"]["approximate search"]
    assert "faiss" in said
    assert "search='faiss'" in said
    with pytest.raises(ModuleNotFoundError, match="pip install faiss-cpu"):
        ASIF(None, None, AnchorTensors(torch.eye(2), torch.eye(2)), search="faiss")
