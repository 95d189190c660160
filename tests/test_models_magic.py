"""MAGIC and contrastive search: the published loops composed of transformers' parts, every way of reading."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from tests.flamingo_tiny import LAYOUTS, OURS, PAD, VOCABULARY, language_model
from vlmkernels.data import ClipTokenizer
from vlmkernels.models import ASIF, CLIP, MAGIC, AnchorTensors, CausalLM, ClipConfig
from vlmkernels.models._magic_lm import CausalLMTexts, CopiedTexts, MaskedTexts, texts_of
from vlmkernels.models.magic import ASIFScorer, DualEncoderScorer, likeliest

needs_transformers = pytest.mark.skipif(
    peers.why_not("transformers") is not None, reason=str(peers.why_not("transformers"))
)
KINDS = ["ours", *(pytest.param(kind, marks=needs_transformers) for kind in LAYOUTS)]
READERS = {"ours": CausalLMTexts, "mpt": CopiedTexts}
END = 2
NEW = 7
WORDS = [
    "dog", "cat", "red", "blue", "on", "a", "the", "in", "bear", "snow", "two", "sofa", "house", "tree",
    "car", "boat", "bird", "man", "woman", "child", "green", "sky", "sea", "sand", "old", "new", "big",
    "small", "field", "street", "plate", "cup", "of", "with", "and", "near", "under", "road", "hill", "sun",
]  # fmt: skip


def decode(ids):
    return " ".join(WORDS[i] for i in ids)


class TableScorer:
    """A scorer that is quick and sees the whole text: a random direction for each word at each position."""

    def __init__(self):
        self.table = torch.randn(32, VOCABULARY, 6, generator=torch.Generator().manual_seed(4)).double()
        self.seen = []

    def similarity(self, image_features, texts):
        self.seen.append(texts)
        rows = [[self.embed(text) for text in row] for row in texts]
        return 3 * torch.einsum("be,bke->bk", image_features, torch.stack([torch.stack(r) for r in rows]))

    def embed(self, text):
        ids = [WORDS.index(word) for word in text.split()]
        parts = [self.table[at, i] for at, i in enumerate(ids)]
        return F.normalize(torch.stack([self.table[0, 0], *parts]).sum(0), dim=0)


def features(rows):
    generator = torch.Generator().manual_seed(9)
    return F.normalize(torch.randn(rows, 6, generator=generator, dtype=torch.float64), dim=-1)


def model_of(kind):
    return language_model(kind).double()


def prompts(rows, length=3):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def hidden_and_logits(model, *texts):
    """The whole texts are read again, without a cache."""
    out = model(input_ids=torch.tensor(texts), output_hidden_states=True)
    return out.hidden_states[-1], out.logits[:, -1]


@torch.no_grad()
def published(model, prompt, score_texts, *, k, alpha, beta, steps, decode=decode):
    """The loop of the published code for one image; `score_texts` gives the scaled logits of k texts."""
    ids = list(prompt)
    for _ in range(steps):
        _, logits = hidden_and_logits(model, ids)
        prob, candidates = logits[0].softmax(-1).topk(k)
        continued = [[*ids, candidate] for candidate in candidates.tolist()]
        states, _ = hidden_and_logits(model, *continued)
        states = states / states.norm(dim=-1, keepdim=True)
        penalty = torch.stack([(row[:-1] @ row[-1]).max() for row in states])
        texts = [decode(each[len(prompt) :][-60:]) for each in continued]
        score = (1 - alpha) * prob - alpha * penalty
        if beta:
            score = score + beta * score_texts(texts).softmax(-1)
        ids.append(candidates[score.argmax()].item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "beta", "k"), [(0.6, 0.0, 5), (0.3, 1.5, 4), (0.0, 2.0, 9)])
def test_equals_the_published_loop(kind, alpha, beta, k):
    """Contrastive search (beta = 0) and MAGIC, token for token, two images at once."""
    model, scorer, images = model_of(kind), TableScorer(), features(2)
    start = prompts(2)
    magic = MAGIC(model, scorer, decode=decode)
    found = magic.generate(start, images, max_new_tokens=NEW, k=k, alpha=alpha, beta=beta)
    for row in range(2):

        def score_texts(texts, row=row):
            return TableScorer().similarity(images[row : row + 1], [texts])[0]

        wanted = published(model, start[row].tolist(), score_texts, k=k, alpha=alpha, beta=beta, steps=NEW)
        assert found[row].tolist() == wanted
    assert bool(scorer.seen) == (beta > 0)


@needs_transformers
def test_equals_gpt2_and_clip_of_transformers():
    """The published composition: GPT2LMHeadModel, CLIPModel and its tokenizer, special tokens left in."""
    transformers = peers.load("transformers")
    ours = ClipTokenizer()
    lm = model_of("gpt2").float()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    torch.manual_seed(3)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=24
        )
    ).eval()
    pixels = torch.randn(3, 3, 16, 16)
    end = "<|endoftext|>"

    def decode_all(ids):
        return " ".join(end if i == END else WORDS[i] for i in ids)

    def tokens_of(texts):
        rows = []
        for text in texts:
            words = [ours.encode(part) for part in text.split(end)]
            inside = words[0] + [i for part in words[1:] for i in [ours.eot_id, *part]]
            rows.append(torch.tensor([*[ours.sot_id, *inside][:76], ours.eot_id]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ours.eot_id)
        return ids, torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    fields = {"eot_id": ours.eot_id, "quick_gelu": True, "vision_heads": 2, "text_heads": 2}
    bundle = DualEncoderScorer(CLIP.from_hf_state_dict(theirs.state_dict(), **fields), ours)
    images = bundle.model.encode_image(pixels)
    magic = MAGIC(lm, bundle, decode=decode_all, eos_token_id=END)
    start = torch.full((3, 1), 1)
    found = magic.generate(start, images, max_new_tokens=10, k=8, alpha=0.1, beta=2.0)
    with torch.no_grad():
        seen = F.normalize(theirs.get_image_features(pixels).pooler_output, dim=-1)
    for row in range(3):

        def score_texts(texts, row=row):
            ids, mask = tokens_of(texts)
            out = theirs.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            return theirs.logit_scale.exp() * F.normalize(out, dim=-1) @ seen[row]

        wanted = published(lm, [1], score_texts, k=8, alpha=0.1, beta=2.0, steps=10, decode=decode_all)
        wanted = wanted[: wanted.index(END) + 1] if END in wanted else wanted
        assert found[row, : len(wanted)].tolist() == wanted
        assert found[row, len(wanted) :].eq(END).all()
    assert len({tuple(row) for row in found.tolist()}) > 1, "the images decide something"


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_a_limit(kind):
    """alpha = beta = 0 whatever k, k = 1 whatever alpha and beta."""
    model, start = model_of(kind), prompts(2)
    wanted = start
    with torch.no_grad():
        for _ in range(NEW):
            wanted = torch.cat([wanted, model(input_ids=wanted).logits[:, -1].argmax(-1, keepdim=True)], 1)
    magic = MAGIC(model, TableScorer(), decode=decode)
    for options in ({"k": 1, "alpha": 0.7, "beta": 3.0}, {"k": 7, "alpha": 0.0, "beta": 0.0}):
        found = magic.generate(start, features(2), max_new_tokens=NEW, **options)
        assert found.equal(wanted[:, 3:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_rows(kind):
    """Prompts of several lengths, texts that end at several steps: each as if it were alone."""
    model, images, lengths = model_of(kind), features(5), (1, 4, 2, 4, 3)
    if kind == "mpt":  # in float64 padding on the left gives NaN in the model itself
        model = model.float()
    ids, mask = torch.full((5, 4), PAD), torch.zeros(5, 4, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 4 - length :], mask[row, 4 - length :] = prompts(5, 4)[row, :length], 1
    options = {"max_new_tokens": NEW, "k": 5, "alpha": 0.4, "beta": 1.0}
    for end in (None, 37, 24, 16):
        magic = MAGIC(model, TableScorer(), decode=decode, eos_token_id=end, pad_token_id=7)
        alone = [
            magic.generate(ids[row : row + 1, 4 - length :], images[row : row + 1], **options)[0].tolist()
            for row, length in enumerate(lengths)
        ]
        assert all(end not in row[:-1] for row in alone)
        ends = {len(row) for row in alone}
        together = magic.generate(ids, images, attention_mask=mask, **options)
        assert together.tolist() == [row + [7] * (max(ends) - len(row)) for row in alone]
        if end is None:
            assert ends == {NEW}


def test_the_candidates_of_a_step():
    """The likeliest first, of equals the lower id, at most the vocabulary; p is of the whole softmax."""
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    prob, ids = likeliest(logits, 3)
    assert ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    torch.testing.assert_close(prob, logits.softmax(-1).gather(1, ids))
    assert likeliest(logits.bfloat16(), 9)[0].shape == (2, 4)
    assert likeliest(logits.bfloat16(), 9)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_texts_share_what_was_read(kind):
    """Hidden states and logits of alternatives equal those of every text alone; nothing is copied k times."""
    model, ids = model_of(kind), prompts(2, 5)
    texts, copied = texts_of(model), CopiedTexts(model)
    assert type(texts) is READERS.get(kind, MaskedTexts)
    with torch.no_grad():
        for each in (texts, copied):
            first = each.read(ids, None)
            torch.testing.assert_close(first.hidden[1], hidden_and_logits(model, ids[1].tolist())[0][0])
        alternatives = torch.tensor([[4, 9, 11], [9, 4, 3]])
        for step in range(2):
            chosen = torch.tensor([2 - step, 1])
            hidden = [each.alternatives(alternatives) for each in (texts, copied)]
            torch.testing.assert_close(*hidden, rtol=1e-7, atol=1e-7)
            logits = [each.choose(chosen) for each in (texts, copied)]
            torch.testing.assert_close(*logits, rtol=1e-7, atol=1e-7)
            ids = torch.cat([ids, alternatives.gather(1, chosen[:, None])], 1)
            for row in range(2):
                wanted = hidden_and_logits(model, ids[row].tolist())[1][0]
                torch.testing.assert_close(logits[0][row], wanted, rtol=1e-7, atol=1e-7)


def test_hooks_of_a_language_model_see_its_calls():
    model, calls = model_of("ours"), []
    wanted = MAGIC(model).generate(prompts(2), beta=0.0, k=3, max_new_tokens=4)
    model.register_forward_hook(lambda *_: calls.append(1))
    assert type(texts_of(model)) is CopiedTexts
    assert MAGIC(model).generate(prompts(2), beta=0.0, k=3, max_new_tokens=4).equal(wanted)
    assert len(calls) == 5  # the prompt, and the candidates of four steps


def test_alternatives_of_a_causal_lm(tmp_path):
    """Padding on the left, a cache of nothing but padding in a row's start, and what is refused."""
    model = model_of("ours")
    ids = prompts(1, 6)
    with torch.no_grad():
        whole = model(torch.cat([ids, torch.tensor([[8]])], 1), output_hidden_states=True).hidden_states[-1]
        padded = torch.cat([torch.full((1, 3), PAD), ids], 1)
        mask = (torch.arange(9) >= 3).long()[None]
        past = model(padded, mask, use_cache=True).past_key_values
        found = model.alternatives(torch.tensor([[5, 8]]), past, mask)
        torch.testing.assert_close(found[0, 1], whole[0, -1])
        past.choose(torch.tensor([1]))
        assert past.get_seq_length() == 10
        assert past.beside == {}
        again = model(torch.tensor([[4]]), torch.cat([mask, torch.ones(1, 2).long()], 1), past)
        longer = torch.cat([ids, torch.tensor([[8, 4]])], 1)
        torch.testing.assert_close(again.logits[0, -1], model(longer).logits[0, -1])
        with pytest.raises(ValueError, match=r"input_ids must be \[B, k\], got \[3\]"):
            model.alternatives(torch.tensor([1, 2, 3]), past)
        with pytest.raises(ValueError, match=r"attention_mask must be \[1, 11\] .* got \[1, 3\]"):
            model.alternatives(torch.tensor([[1]]), past, torch.ones(1, 3))
        full = model(prompts(1, 64), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="fewer than context_length = 64 tokens, got 64"):
            model.alternatives(torch.tensor([[1]]), full)


def test_the_scorer_sees_the_last_new_tokens_without_the_end():
    model, scorer = model_of("ours"), TableScorer()
    magic = MAGIC(model, scorer, decode=decode, eos_token_id=3)
    found = magic.generate(prompts(1), features(1), max_new_tokens=6, k=40, beta=1.0, text_tokens=2)
    assert 3 not in found[0, :5].tolist(), "ends too early to see anything"
    texts = scorer.seen[3][0]
    written = [WORDS[i] for i in found[0, :3].tolist()]
    lengths = {len(text.split()) for text in texts}
    assert lengths == {1, 2}  # one candidate is the end, after which one of the last two tokens is left
    assert {text.split()[0] for text in texts} == {written[-1]}
    assert len(scorer.seen) == 6


def test_a_scorer_of_a_trained_clip():
    """scale * cosine, whatever the length of the image features; texts of all images in one batch."""
    config = ClipConfig(
        embed_dim=16, image_size=16, patch_size=8, vision_layers=1, vision_width=16, vision_heads=2,
        context_length=12, vocab_size=600, text_width=16, text_layers=1, text_heads=2, eot_id=599,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = CLIP(config).eval(), ClipTokenizer(12, 600)
    scorer, texts = DualEncoderScorer(model, tokenizer), [["a dog", "a cat"], ["red", ""]]
    images = model.encode_image(torch.randn(2, 3, 16, 16)).detach()
    found = scorer.similarity(5 * images, texts)
    assert not found.requires_grad
    for row in range(2):
        out = model.encode_text(tokenizer(texts[row]), normalize=True)
        wanted = model.logit_scale.exp() * (out @ F.normalize(images[row], dim=-1))
        torch.testing.assert_close(found[row], wanted.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0, "alpha": 1.5}, r"k must be at least 1, got 0; alpha must be in \[0, 1\], got 1.5"),
        ({"beta": -1.0}, "beta must be finite and not negative, got -1.0"),
        ({"beta": float("nan")}, "beta must be finite and not negative, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"text_tokens": 0}, "text_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 62}, r"must be at most 64 tokens together, got 3 \+ 62"),
        ({"image_features": None}, "image_features must be given with beta, got None with beta 2.0"),
        (
            {"image_features": torch.ones(3, 6)},
            r"image_features must be \[2, ...\] like input_ids, got \[3, 6\]",
        ),
        (
            {"input_ids": torch.ones(2, 0).long()},
            r"int64 \[B, T\] with at least one token, got torch.int64 \[2, 0\]",
        ),
        (
            {"attention_mask": torch.ones(2, 2)},
            r"attention_mask must be \[2, 3\] like input_ids, got \[2, 2\]",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
            "zeros on the left and a one in every row",
        ),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    magic = MAGIC(model_of("ours"), TableScorer(), decode=decode)
    given = {"input_ids": prompts(2), "image_features": features(2), **arguments}
    with pytest.raises(ValueError, match=message):
        magic.generate(**given)


def test_other_invalid_use():
    model = model_of("ours")
    with pytest.raises(ValueError, match=r"beta must be 0 without a scorer, got 2\.0"):
        MAGIC(model).generate(prompts(1), features(1))
    with pytest.raises(ValueError, match="decode must be given with a scorer"):
        MAGIC(model, TableScorer())

    class Wrong:
        def similarity(self, image_features, texts):
            return torch.zeros(len(texts))

    with pytest.raises(ValueError, match=r"scorer must return \[images, texts\] = \[1, 4\], got \[1\]"):
        MAGIC(model, Wrong(), decode=decode).generate(prompts(1), features(1), k=4)
    empty = MAGIC(model, TableScorer(), decode=decode).generate(prompts(2)[:0], features(0))
    assert empty.shape == (0, 0)


@pytest.mark.parametrize("kind", ["ours", pytest.param("gpt2", marks=needs_transformers)])
def test_16_bits(kind):
    """Hidden states of 16 bits with float32 probabilities and scores; integers as weights."""
    model = language_model(kind).bfloat16()
    magic = MAGIC(model, TableScorer(), decode=decode)
    found = magic.generate(prompts(2), features(2), max_new_tokens=3, k=4, alpha=0, beta=1)
    assert found.shape == (2, 3)
    greedy = magic.generate(prompts(2), max_new_tokens=3, k=1, alpha=1, beta=0)
    assert greedy[:, 0].equal(model(input_ids=prompts(2)).logits[:, -1].argmax(-1))


def test_nothing_is_changed():
    """No gradient, no state: the same call gives the same tokens, and the models are as they were."""
    model = model_of("ours")
    before = copy.deepcopy(model.state_dict())
    magic = MAGIC(model, TableScorer(), decode=decode)
    found = [magic.generate(prompts(2), features(2), max_new_tokens=5, k=4) for _ in range(2)]
    assert found[0].equal(found[1])
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(model, CausalLM)
    assert OURS.vocab_size == VOCABULARY == len(WORDS)


def test_a_scorer_encodes_equal_texts_once():
    """Of all images together, and gives each its own logits."""
    calls = []

    class Listener(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.eye(3))

        def encode_text(self, tokens, normalize):
            calls.append(len(tokens))
            return self.table[tokens[:, 0]]

        def scale(self):
            return torch.tensor(10.0)

    scorer = DualEncoderScorer(Listener(), lambda texts: torch.tensor([[len(text)] for text in texts]))
    images = torch.eye(3)[[1, 2]]
    found = scorer.similarity(images, [["a", "bb", "a"], ["bb", "", "a"]])
    assert found.tolist() == [[10.0, 0.0, 10.0], [10.0, 0.0, 0.0]]
    assert calls == [3]


def test_asif_is_a_scorer():
    """Scores by the dense formula times the scale, of each image with its own texts; they guide MAGIC."""
    generator = torch.Generator().manual_seed(2)
    anchors = AnchorTensors(*(torch.randn(50, width, generator=generator) for width in (7, 5)))
    table = torch.randn(len(WORDS) + 1, 5, generator=generator)
    calls = []

    def encode(texts):
        calls.append(len(texts))
        rows = [[WORDS.index(word) for word in text.split()] or [len(WORDS)] for text in texts]
        return torch.stack([table[row].mean(0) for row in rows])

    images, texts = torch.randn(2, 7, generator=generator), [["a dog", "red", ""], ["red", "the cat", "sun"]]
    scorer = ASIFScorer(ASIF(None, encode, anchors, k=9, p=3), scale=20.0)
    found = scorer.similarity(images, texts)
    assert calls == [5]
    for row in range(2):
        reps = []
        for x, y in ((images[row : row + 1], anchors.images), (encode(texts[row]), anchors.texts)):
            cosines = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
            kept = torch.zeros_like(cosines).scatter(1, *reversed(cosines.topk(9, dim=1)))
            reps.append(F.normalize(kept.clamp_min(0) ** 3, dim=1))
        torch.testing.assert_close(found[row], 20 * (reps[0] @ reps[1].T)[0])
    magic = MAGIC(model_of("ours"), scorer, decode=decode)
    several = torch.randn(6, 7, generator=generator)
    written = magic.generate(prompts(1).expand(6, -1), several, max_new_tokens=4, k=8)
    assert len({tuple(row) for row in written.tolist()}) > 1
