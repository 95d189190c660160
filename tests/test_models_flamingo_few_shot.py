"""Prompts as in open_flamingo's evaluation, labels as in its training, demonstrations by similarity."""

import pytest
import torch

from benchmarks import peers
from vlmkernels.models.few_shot import caption_prompt, few_shot_prompt, media_labels, rices, vqa_prompt

MEDIA, END, PAD = 8, 9, 0


def test_captions():
    assert caption_prompt() == "<image>Output:"
    assert caption_prompt("two cats") == "<image>Output:two cats<|endofchunk|>"
    text = few_shot_prompt(["two cats", "a dog", "a tree"], shots=2)
    assert text == "<image>Output:two cats<|endofchunk|><image>Output:a dog<|endofchunk|><image>Output:"
    assert few_shot_prompt(["a", "b"]).count("<image>") == 3
    assert few_shot_prompt([]) == "<image>Output:"
    assert few_shot_prompt(["a"], separator="\n") == "<image>Output:a<|endofchunk|>\n<image>Output:"


def test_questions():
    assert vqa_prompt("what?", "a cat") == "<image>Question:what? Short answer:a cat<|endofchunk|>"
    text = few_shot_prompt([("where?", "here")], "who?")
    assert text == (
        "<image>Question:where? Short answer:here<|endofchunk|><image>Question:who? Short answer:"
    )


def test_zero_shots_are_two_texts_without_images():
    assert few_shot_prompt(["a <image> of a cat", "b", "c"], shots=0) == (
        "Output:a <image> of a cat<|endofchunk|>Output:b<|endofchunk|><image>Output:"
    )
    assert few_shot_prompt([("q", "a"), ("r", "b")], "s", shots=0).count("<image>") == 1


def test_prompts_that_do_not_fit():
    with pytest.raises(ValueError, match="must be at least 2 for 0 shots, got 1"):
        few_shot_prompt(["a"], shots=0)
    with pytest.raises(ValueError, match="must be at least 3 for 3 shots, got 2"):
        few_shot_prompt(["a", "b"], shots=3)
    with pytest.raises(ValueError, match="shots must be at least 0, got -1"):
        few_shot_prompt(["a", "b"], shots=-1)
    with pytest.raises(ValueError, match="got one str"):
        few_shot_prompt("a cat")
    with pytest.raises(ValueError, match=r"must be \(question, answer\) pairs with a question"):
        few_shot_prompt(["a"], "who?")
    with pytest.raises(ValueError, match=r"must be captions \(str\) without a question"):
        few_shot_prompt([("a", "b")])


def labels_by_hand(tokens, interleaved):
    """The loops of open_flamingo's training, on lists."""
    rows = []
    for row in tokens.tolist():
        labels = [-100 if token == PAD else token for token in row]
        if interleaved:
            place = 0
            while place < len(labels) and labels[place] != MEDIA:
                labels[place] = -100
                place += 1
            for end in [i for i, label in enumerate(labels) if label == END]:
                place = end + 1
                while place < len(labels) and labels[place] != MEDIA:
                    labels[place] = -100
                    place += 1
        rows.append([-100 if label == MEDIA else label for label in labels])
    return torch.tensor(rows)


@pytest.mark.parametrize("interleaved", [True, False])
def test_labels(interleaved):
    example = torch.tensor([[4, END, MEDIA, 5, 6, END, 7, END, MEDIA, 3, MEDIA, END, PAD]])
    wanted = [-100, -100, -100, 5, 6, END, -100, -100, -100, 3, -100, END, -100]
    if not interleaved:
        wanted = [4, END, -100, 5, 6, END, 7, END, -100, 3, -100, END, -100]
    ids = {"media_token_id": MEDIA, "endofchunk_token_id": END, "interleaved": interleaved}
    assert media_labels(example, pad_token_id=PAD, **ids).tolist() == [wanted]
    tokens = torch.randint(1, 10, (200, 17))
    lengths = torch.randint(0, 18, (200, 1))
    tokens[torch.arange(17) >= lengths] = PAD
    by_hand = labels_by_hand(tokens, interleaved)
    assert torch.equal(media_labels(tokens, pad_token_id=PAD, **ids), by_hand)
    assert torch.equal(media_labels(tokens, attention_mask=tokens != PAD, **ids), by_hand)
    assert (by_hand == END).any()


def test_rices_finds_the_nearest_and_puts_the_most_similar_last():
    support, query = torch.randn(50, 8), torch.randn(9, 8)
    similarity = torch.nn.functional.cosine_similarity(query[:, None], support[None], dim=-1)
    wanted = similarity.topk(4).indices.flip(1)
    for chunk in (2, 9, 100):
        assert torch.equal(rices(query, 7 * support, 4, chunk=chunk), wanted)
    assert rices(query, support, 0).shape == (9, 0)
    assert rices(query[:0], support, 3).shape == (0, 3)
    assert rices(support, support, 1).flatten().tolist() == list(range(50))
    others = rices(support, support, 3, exclude=torch.arange(50))
    assert not (others == torch.arange(50)[:, None]).any()
    assert torch.equal(rices(query, support, 4, exclude=torch.full((9,), -1)), wanted)
    equal = rices(query, support[:1].expand(5, 8), 3)
    assert equal.tolist() == [[2, 1, 0]] * 9


def test_rices_that_do_not_fit():
    support = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"got \[2, 7\] and \[3, 8\]"):
        rices(torch.randn(2, 7), support, 1)
    with pytest.raises(ValueError, match="the support images without excluded ones, got 4"):
        rices(support, support, 4)
    with pytest.raises(ValueError, match=r"in \[0, 3\].*got 3.*exclude must be \[3\], got \[2\]"):
        rices(support, support, 3, exclude=torch.zeros(2))


reason = peers.why_not("open_flamingo.eval.utils")


@pytest.mark.skipif(reason is not None, reason=str(reason))
def test_zero_shot_texts_as_many_as_open_flamingo():
    effective = peers.load("open_flamingo.eval.utils").compute_effective_num_shots(0, "open_flamingo")
    assert few_shot_prompt(["a"] * 9, shots=0).count("<|endofchunk|>") == effective
