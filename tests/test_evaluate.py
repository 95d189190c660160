"""Evaluation, embedding and search: hand-computed ranks, brute force, and small models in folders."""

import json
import math
import os
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlmkernels.data import image_transform, load_emoji3, load_pairs, read_image
from vlmkernels.data.csv_pairs import BrokenImageError
from vlmkernels.data.tokenizer import ClipTokenizer
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.use import evaluate as ev
from vlmkernels.use.bundle import Bundle, load_model
from vlmkernels.use.embed import embed, encode_texts, read_embeddings
from vlmkernels.use.images import find_images
from vlmkernels.use.search import cache_file, search

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}


@pytest.fixture(scope="module")
def bundle():
    torch.manual_seed(0)
    config = ClipConfig(
        embed_dim=16,
        image_size=16,
        vision_layers=1,
        vision_width=16,
        vision_heads=2,
        patch_size=8,
        context_length=16,
        vocab_size=600,
        eot_id=599,
        text_width=16,
        text_layers=1,
        text_heads=2,
    )
    return Bundle(CLIP(config).eval(), ClipTokenizer(16, 600), image_transform(16))


@pytest.fixture(scope="module")
def model_folder(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "final"
    bundle.save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (20 + i, 24), colour).save((folder if i % 2 else folder / "below") / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("no image either")
    return folder


def same(query_ids, key_ids):
    return (query_ids[:, None] == key_ids).nonzero()


def test_ranks_by_hand():
    key = torch.eye(4)
    query = torch.tensor([[0.9, 0.1, 0.5, 0.0], [0.3, 0.2, 0.6, 0.1], [0.1, 0.2, 0.3, 0.4]])
    places = ev.ranks(query, key, torch.tensor([[0, 0], [1, 1], [2, 0]]))
    assert places.tolist() == [1, 3, 4]


def test_ranks_take_the_best_of_several_matches():
    key = torch.eye(4)
    query = torch.tensor([[0.1, 0.9, 0.5, 0.2]])
    assert ev.ranks(query, key, torch.tensor([[0, 0], [0, 2]])).item() == 2


def test_ties_count_against_the_match():
    features = torch.ones(5, 3)
    own = torch.arange(5)[:, None].expand(5, 2)
    every = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    assert ev.ranks(features, features, own).tolist() == [5] * 5
    assert ev.ranks(features, features, every).tolist() == [1] * 5
    assert ev.ranks(features * math.nan, features, own).tolist() == [5] * 5


def test_ranks_equal_brute_force_for_any_chunk():
    query, key = F.normalize(torch.randn(57, 8), dim=1), F.normalize(torch.randn(91, 8), dim=1)
    key_ids = torch.arange(91) % 40
    query_ids = torch.randint(0, 40, (57,))
    scores = (query @ key.T).tolist()
    expected = []
    for row, own in zip(scores, query_ids.tolist(), strict=True):
        best = max(score for score, other in zip(row, key_ids.tolist(), strict=True) if other == own)
        expected.append(
            1 + sum(s >= best for s, other in zip(row, key_ids.tolist(), strict=True) if other != own)
        )
    for scores_at_once in (1, 200, 10**6):
        places = ev.ranks(query, key, same(query_ids, key_ids), scores_at_once=scores_at_once)
        assert places.tolist() == expected


def test_ranks_name_a_query_without_match():
    with pytest.raises(ValueError, match="got none for query 2"):
        ev.ranks(torch.ones(3, 2), torch.ones(2, 2), torch.tensor([[0, 0], [1, 1]]), scores_at_once=4)


@pytest.mark.parametrize(
    ("keys", "matches", "k"), [(10, 1, 1), (10, 1, 5), (12, 3, 5), (7, 2, 7), (4, 1, 10)]
)
def test_chance_is_the_hypergeometric_one(keys, matches, k):
    first = min(k, keys)
    expected = 1 - math.comb(keys - matches, first) / math.comb(keys, first)
    assert ev.chance_recall(keys, matches, k) == pytest.approx(expected, abs=1e-12)


def test_retrieval_of_random_features_is_near_chance():
    n = 2000
    images, texts = F.normalize(torch.randn(n, 32), dim=1), F.normalize(torch.randn(n, 32), dim=1)
    result = ev.retrieval(images, texts, [str(i) for i in range(n)])
    for direction in ("image_to_text", "text_to_image"):
        values = result[direction]
        assert values["chance"]["R@10"] == pytest.approx(10 / n)
        assert values["chance"]["median_rank"] == n / 2
        assert values["R@10"] < 4 * values["chance"]["R@10"]
        assert abs(values["median_rank"] - n / 2) < n / 10


def test_equal_texts_are_one_text_that_matches_all_its_images():
    images = torch.eye(4)
    # Images 0 and 3 are both "a"; the text "a" lies nearest to image 3, "b" and "c" nearest to image 2.
    a, b, c = torch.tensor([[0.6, 0.0, 0.0, 0.8], [0.0, 0.7, 0.71, 0.0], [0.0, 0.0, 1.0, 0.0]])
    result = ev.retrieval(images, torch.stack([a, b, c, a]), ["a", "b", "c", "a"])
    assert (result["images"], result["texts"]) == (4, 3)
    assert result["image_to_text"]["R@1"] == 1.0
    assert result["text_to_image"]["R@1"] == pytest.approx(2 / 3)
    assert result["text_to_image"]["R@5"] == 1.0
    assert result["text_to_image"]["chance"]["R@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert result["image_to_text"]["chance"]["R@1"] == pytest.approx(1 / 3)


def test_an_image_with_several_texts_is_one_image_and_any_of_its_texts_will_do():
    images = torch.eye(3)[[0, 0, 1, 2]]  # rows 0 and 1 are the same picture with the captions "a" and "b"
    texts = torch.tensor([[0.2, 0.9, 0.3], [0.9, 0.1, 0.1], [0.0, 0.8, 0.0], [0.0, 0.0, 1.0]])
    result = ev.retrieval(images, texts, ["a", "b", "c", "d"], ["x.png", "x.png", "y.png", "z.png"])
    assert (result["images"], result["texts"]) == (3, 4)
    # y.png lies nearer to "a" (0.9) than to its own "c" (0.8).
    assert result["image_to_text"]["R@1"] == pytest.approx(2 / 3)
    # "a" finds y.png first; the others find their own picture.
    assert result["text_to_image"]["R@1"] == pytest.approx(3 / 4)
    assert result["image_to_text"]["chance"]["R@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_retrieval_refuses_sizes_that_differ():
    with pytest.raises(ValueError, match="must have the same length"):
        ev.retrieval(torch.ones(2, 4), torch.ones(3, 4), ["a", "b"])
    with pytest.raises(ValueError, match="must have the same length"):
        ev.retrieval(torch.ones(0, 4), torch.ones(0, 4), [])


def test_classification_by_hand():
    weights = torch.eye(6)
    labels = torch.tensor([0, 0, 0, 1, 5])
    features = weights[torch.tensor([0, 0, 2, 1, 3])] + 0.1 * weights[torch.tensor([1, 1, 0, 0, 5])]
    result = ev.classification(features, labels, weights)
    assert result["top1"] == pytest.approx(3 / 5)
    assert result["top5"] == 1.0
    assert result["mean_per_class"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert result["chance"] == {
        "top1": 1 / 6,
        "top5": 5 / 6,
        "mean_per_class": 1 / 6,
        "largest_class": pytest.approx(3 / 5),
    }
    with pytest.raises(ValueError, match="labels must be in"):
        ev.classification(features, labels - 1, weights)


def test_class_weights_are_normalised_means_of_normalised_embeddings(bundle):
    texts = [["red", "dark red", "a red thing"], ["blue"]]
    weights = ev.class_weights(bundle.model, bundle.tokenizer, texts, batch_size=2)
    with torch.no_grad():
        rows = [F.normalize(bundle.model.encode_text(bundle.tokenizer(group)), dim=1) for group in texts]
    expected = torch.stack([F.normalize(row.mean(0), dim=0) for row in rows])
    torch.testing.assert_close(weights, expected)
    with pytest.raises(ValueError, match=r"\[1\] have none"):
        ev.class_weights(bundle.model, bundle.tokenizer, [["red"], []])


def test_templates():
    assert ev.fill(["a {}.", "{}!"], ["cat", "dog"]) == ["a cat.", "a dog.", "cat!", "dog!"]
    with pytest.raises(ValueError, match="templates"):
        ev.fill(["a cat"], ["cat"])


def test_emoji_class_texts_see_no_tested_concept():
    test = load_emoji3("concept-test")
    texts = ev.emoji_class_texts(test)
    captions = {text for group in texts["captions"] for text in group}
    assert len(texts["names"]) == len(texts["captions"]) == 9
    assert texts["names"][2] == ["animals", "nature"]
    assert captions == set(load_emoji3("concept-train").names)
    assert not captions & set(test.names)


class PerfectModel(torch.nn.Module):
    """Embeds a text as its number and an image as the number in its first pixel."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode_image(self, images, normalize=False):
        return F.one_hot(images[:, 0, 0, 0].long(), 300).float()

    def encode_text(self, tokens, normalize=False):
        return F.one_hot(tokens[:, 0], 300).float()


class Numbered(torch.utils.data.Dataset):
    """Sample i shows i and says i; some cannot be read."""

    def __init__(self, count, broken=()):
        self.count, self.broken, self.skipped = count, broken, {}

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.broken:
            self.skipped[f"{i}.png"] = "damaged"
            raise BrokenImageError("damaged")
        image = torch.full((3, 2, 2), float(i))
        return {"image": image, "text": str(i), "key": f"{i}.png", "label": -1, "concept": -1}


class Shards(torch.utils.data.IterableDataset):
    """Two shards that both count their keys from zero."""

    def __iter__(self):
        for i in range(20):
            yield {**Numbered(20)[i], "key": str(i % 10)}


def numbers(texts):
    return torch.tensor([[int(text)] for text in texts])


def test_a_perfect_model_is_right_and_broken_images_are_left_out():
    model = PerfectModel().train()
    state = torch.get_rng_state()
    data = Numbered(30, broken=[7, 8, 9, 10, 11, 12, 13, 29])
    result = ev.evaluate_model(model, numbers, None, data, batch_size=7)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert result.samples == result.retrieval["images"] == 22
    assert list(result.skipped) == [f"{i}.png" for i in data.broken]
    assert result.retrieval["image_to_text"]["R@1"] == result.retrieval["text_to_image"]["R@1"] == 1.0
    assert result.zero_shot is None


def test_shards_may_repeat_keys():
    result = ev.evaluate_model(PerfectModel(), numbers, None, Shards(), batch_size=7)
    assert result.samples == result.retrieval["images"] == 20
    assert result.retrieval["text_to_image"]["R@1"] == 1.0


def test_evaluate_a_table(model_folder, tmp_path):
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 24), colour).save(tmp_path / f"{name}.png")
    rows = [f"{name}.png\t{caption} {name}" for name in COLOURS for caption in ("the colour", "all")]
    (tmp_path / "torn.png").write_bytes(b"torn")
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows, "torn.png\ttorn"]))
    result = ev.evaluate(model_folder, str(tmp_path / "pairs.tsv"), batch_size=3)
    assert (result.samples, result.retrieval["images"], result.retrieval["texts"]) == (8, 4, 8)
    assert list(result.skipped) == ["torn.png"]
    assert result.retrieval["image_to_text"]["R@10"] == 1.0


def test_a_part_of_a_table_is_evaluated_alone(bundle, tmp_path):
    """What cannot be read is not replaced by a neighbour, and belongs to the part that holds it."""
    for i in range(6):
        Image.new("RGB", (20, 24), COLOURS["red"]).save(tmp_path / f"{i}.png")
    for i in (1, 4):
        (tmp_path / f"{i}.png").write_bytes(b"torn")
    Image.new("RGB", (7, 7), "blue").save(tmp_path / "5.png")
    rows = "".join(f"{i}.png\ttext {i}\n" for i in range(6))
    (tmp_path / "pairs.tsv").write_text(f"filepath\ttitle\n{rows}")
    pairs = load_pairs(str(tmp_path / "pairs.tsv"))

    def transform(image):
        if image.width < 8:
            raise RuntimeError("too small")
        return bundle.transform(image)

    for indices, count, skipped in (([0, 1, 2], 2, {"1.png"}), ([3, 4, 5], 1, {"4.png", "5.png"})):
        part = torch.utils.data.Subset(pairs, indices)
        result = ev.evaluate_model(bundle.model, bundle.tokenizer, transform, part, batch_size=2)
        assert (result.samples, set(result.skipped)) == (count, skipped)


def test_evaluate_on_emoji3(bundle, model_folder):
    dataset = load_emoji3("concept-test")
    result = ev.evaluate(model_folder, dataset, batch_size=100)
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()
    assert result.samples == 370
    assert result.skipped == {}
    assert set(result.zero_shot) == {"names", "captions"}
    assert result.zero_shot["names"]["chance"]["top1"] == pytest.approx(1 / 9)
    again = ev.evaluate_model(bundle.model, bundle.tokenizer, bundle.transform, dataset, batch_size=370)
    assert again.retrieval["image_to_text"]["median_rank"] == pytest.approx(
        result.retrieval["image_to_text"]["median_rank"], abs=2
    )
    with torch.no_grad():
        images = torch.stack([bundle.transform(sample["image"]) for sample in dataset])
        scores = (
            F.normalize(bundle.model.encode_image(images), dim=1)
            @ encode_texts(bundle.model, bundle.tokenizer, dataset.names).T
        )
    top = (scores.argsort(dim=1, descending=True)[:, :10] == torch.arange(370)[:, None]).any(1).float().mean()
    assert result.retrieval["image_to_text"]["R@10"] == pytest.approx(top.item(), abs=2 / 370)


def test_evaluate_class_folders(model_folder, tmp_path):
    for name in ("red_thing", "blue"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (16, 16), COLOURS[name.split("_")[0]]).save(tmp_path / name / f"{i}.png")
    (tmp_path / "blue" / "torn.png").write_bytes(b"\x89PNG")
    result = ev.evaluate(model_folder, tmp_path, templates=["{}", "all {}"])
    assert result.samples == 6
    assert list(result.skipped) == [str(tmp_path / "blue" / "torn.png")]
    assert result.retrieval is None
    assert result.zero_shot["names"]["classes"] == 2
    assert result.zero_shot["names"]["top5"] == 1.0
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other"):
        ev.evaluate(model_folder, tmp_path)


def test_bad_arguments_are_named(model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model: folder .* does not exist"):
        load_model(tmp_path / "absent")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ev.evaluate(model_folder, Numbered(3), batch_size=0)
    with pytest.raises(ValueError, match="no classes"):
        ev.evaluate(model_folder, Numbered(3), templates=["{}"])


@pytest.mark.parametrize("ending", [".safetensors", ".npz"])
def test_embed_images_skips_and_names_broken_ones(bundle, model_folder, pictures, tmp_path, ending):
    out = tmp_path / "new" / f"images{ending}"
    result = embed(model_folder, [pictures], out, batch_size=3)
    assert list(result.skipped) == [str(pictures / "broken.jpg")]
    assert (result.count, result.width) == (4, 16)
    features, keys = read_embeddings(out)
    assert keys == sorted(str(path) for path in pictures.rglob("*.png"))
    assert features.shape == (4, 16)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    with torch.no_grad():
        images = torch.stack([bundle.transform(read_image(Path(key))) for key in keys])
        torch.testing.assert_close(features, bundle.model.encode_image(images, normalize=True))
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_embed_texts(bundle, model_folder, tmp_path):
    texts = ["a red thing", "blue", "grün"]
    embed(model_folder, texts, tmp_path / "t.npz", kind="texts", batch_size=2)
    features, keys = read_embeddings(tmp_path / "t.npz")
    assert keys == texts
    with torch.no_grad():
        expected = bundle.model.encode_text(bundle.tokenizer(texts), normalize=True)
    torch.testing.assert_close(features, expected)


def test_embed_refuses(model_folder, pictures, tmp_path):
    out = tmp_path / "o.npz"
    with pytest.raises(ValueError, match="kind must be one of images, texts, got 'sound'"):
        embed(model_folder, ["x"], out, kind="sound")
    with pytest.raises(ValueError, match=r"out must end in \.safetensors or \.npz"):
        embed(model_folder, [pictures], tmp_path / "o.txt")
    with pytest.raises(ValueError, match="inputs must be a sequence"):
        embed(model_folder, str(pictures), out)
    with pytest.raises(FileNotFoundError, match="absent"):
        embed(model_folder, [pictures / "absent"], out)
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        embed(model_folder, [pictures / "broken.jpg"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        embed(model_folder, [tmp_path / "empty"], out)
    assert not out.exists()


def test_find_images_gives_each_once(pictures):
    files = find_images([pictures / "green.png", pictures])
    assert len(files) == len(set(files)) == 5
    assert files[0] == pictures / "green.png"


def test_transparent_images_lie_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert numpy.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_search_ranks_and_caches(bundle, model_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = search(model_folder, "red", pictures, k=3)
    assert (found.searched, found.cached, len(found.hits)) == (4, 0, 3)
    assert list(found.skipped) == [str(pictures / "broken.jpg")]
    text = encode_texts(bundle.model, bundle.tokenizer, ["red"])[0]
    with torch.no_grad():
        paths = sorted(pictures.rglob("*.png"))
        images = torch.stack([bundle.transform(read_image(path)) for path in paths])
        scores = bundle.model.encode_image(images, normalize=True) @ text
    order = scores.argsort(descending=True)[:3]
    assert [hit.path for hit in found.hits] == [paths[i] for i in order]
    torch.testing.assert_close(torch.tensor([hit.score for hit in found.hits]), scores[order])

    store = cache_file(model_folder, pictures)
    assert store.is_file()
    assert store.is_relative_to(tmp_path / "cache")
    again = search(model_folder, "red", pictures, k=3)
    assert again.cached == 4
    assert again.hits == found.hits

    status = (pictures / "green.png").stat()
    os.utime(pictures / "green.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert search(model_folder, "red", pictures).cached == 3
    assert search(model_folder, "red", pictures, cache=False).cached == 0
    store.write_bytes(b"damaged")
    repaired = search(model_folder, "red", pictures, k=3)
    assert repaired.cached == 0
    assert [hit.path for hit in repaired.hits] == [hit.path for hit in found.hits]
    assert search(model_folder, "red", pictures).cached == 4


def test_search_does_without_a_cache_that_cannot_be_written(model_folder, pictures, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert search(model_folder, "red", pictures, k=1).searched == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    assert search(model_folder, "red", pictures, k=1).searched == 4


def test_search_refuses(model_folder, pictures):
    with pytest.raises(ValueError, match="query_text must not be empty"):
        search(model_folder, " ", pictures)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        search(model_folder, "red", pictures, k=0)
