"""drop_in for the losses of open_clip."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vlmkernels
from benchmarks import peers
from tests.parity import needs
from vlmkernels.integrations import drop_in, patch
from vlmkernels.testing import assert_as_good


class TestOpenClipLosses:
    pytestmark = needs("open_clip")

    def features(self, dtype=torch.float32):
        torch.manual_seed(0)
        image, text = (nn.functional.normalize(torch.randn(6, 8), dim=-1).to(dtype) for _ in range(2))
        return image, text, torch.tensor(20.0)

    @pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
    def test_on_the_meta_device(self, name):
        """Autocast does not know it."""
        loss = drop_in(getattr(peers.load("open_clip.loss"), name))()
        bias = [torch.tensor(-10.0, device="meta")] * (name == "SigLipLoss")
        image, text, scale = (x.to("meta") for x in self.features(torch.bfloat16))
        result = loss(image, text, scale, *bias)
        assert (result.device.type, result.dtype) == ("meta", torch.bfloat16)

    def test_drop_in_is_a_subclass_with_the_same_constructor(self):
        loss = peers.load("open_clip.loss")
        for cls, arguments in (
            (loss.ClipLoss, {"cache_labels": True}),
            (loss.CoCaLoss, {"caption_loss_weight": 2.0, "clip_loss_weight": 1.0}),
            (loss.SigLipLoss, {"dist_impl": "gather"}),
            (loss.DistillClipLoss, {"local_loss": True}),
        ):
            ours = drop_in(cls)
            assert issubclass(ours, cls)
            assert ours is drop_in(cls)
            made, plain = ours(**arguments), cls(**arguments)
            assert vars(plain).keys() <= vars(made).keys()
            assert patch(made).patched
            assert (ours.__name__, ours.__module__) == (cls.__name__, cls.__module__)
            assert type(pickle.loads(pickle.dumps(made))) is ours
            assert type(copy.deepcopy(made)) is ours

    @pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "SigLipLoss"])
    def test_our_op_computes_the_loss(self, name, monkeypatch):
        cls = getattr(peers.load("open_clip.loss"), name)
        op = "sigmoid_loss" if name == "SigLipLoss" else "info_nce"
        ours, count = getattr(vlmkernels, op), []
        monkeypatch.setattr(vlmkernels, op, lambda *a, **k: count.append(1) or ours(*a, **k))
        image, text, scale = self.features()
        caption = (torch.randn(6, 3, 7), torch.randint(7, (6, 3))) if name == "CoCaLoss" else ()
        loss = cls(2.0, 1.0) if caption else cls()
        more = {"logit_bias": torch.tensor(-3.0)} if name == "SigLipLoss" else {}
        wanted = loss(image, text, *caption, logit_scale=scale, output_dict=True, **more)
        for patched in (drop_in(cls)(2.0, 1.0) if caption else drop_in(cls)(), loss):
            patch(patched)
            got = patched(image, text, *caption, logit_scale=scale, output_dict=True, **more)
            torch.testing.assert_close(got, wanted)
        assert count == [1, 1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_results_have_the_dtype_of_theirs(self, dtype):
        loss = peers.load("open_clip.loss")
        image, text, scale = self.features(dtype)
        for cls in (loss.ClipLoss, loss.SigLipLoss):
            options = {} if cls is loss.ClipLoss else {"logit_bias": torch.tensor(-3.0)}
            got = drop_in(cls)()(image, text, scale, output_dict=True, **options)
            plain = cls()(image, text, scale, output_dict=True, **options)
            exact = cls()(image.double(), text.double(), scale.double(), **options)
            assert got.keys() == plain.keys()
            assert_as_good(got["contrastive_loss"], plain["contrastive_loss"], exact)

    def test_what_is_refused(self):
        loss = peers.load("open_clip.loss")
        assert "gather_with_grad" in patch(loss.ClipLoss(world_size=2)).refused[0].why
        assert patch(loss.ClipLoss(world_size=2, gather_with_grad=True)).patched
        assert "use_horovod" in patch(loss.ClipLoss(use_horovod=True)).refused[0].why
        assert "builds the logits itself" in patch(type("Mine", (loss.ClipLoss,), {})()).refused[0].why
        assert "builds the logits itself" in patch(type("Mine", (loss.DistillClipLoss,), {})()).refused[0].why
        with pytest.raises(
            ValueError, match=r"drop_in: cls must be a contrastive loss class .* got torch\.nn"
        ):
            drop_in(nn.Linear)
        with pytest.raises(ValueError, match=r"got .*\.Mine"):
            drop_in(type("Mine", (loss.DistillClipLoss,), {}))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_the_distillation_of_open_clip(self, dtype, monkeypatch):
        cls = peers.load("open_clip.loss").DistillClipLoss
        op, count = vlmkernels.contrastive_distillation, []
        counted = lambda *a, **k: count.append(1) or op(*a, **k)  # noqa: E731
        monkeypatch.setattr(vlmkernels, "contrastive_distillation", counted)
        student, teacher = self.features(dtype), (*torch.randn(2, 6, 11, dtype=dtype), torch.tensor(30.0))
        plain = cls()(*student, *teacher)
        exact = cls()(*(x.double() for x in (*student, *teacher)))
        patched = cls()
        patch(patched)
        for ours in (drop_in(cls)(), patched):
            got = ours(*student, *teacher)
            named = ours(*student, *teacher, output_dict=True)
            assert list(named) == ["contrastive_loss", "distill_loss"]
            for a, b, same, truth in zip(got, plain, named.values(), exact, strict=True):
                assert torch.equal(a, same)
                assert_as_good(a, b, truth)
        assert len(count) == 4


class MyLoss(
    drop_in(peers.load("open_clip.loss").ClipLoss) if peers.why_not("open_clip") is None else nn.Module
):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


@needs("open_clip")
def test_a_subclass_of_a_drop_in_is_pickled_as_itself():
    assert type(pickle.loads(pickle.dumps(MyLoss()))) is MyLoss
    image, text, scale = TestOpenClipLosses().features()
    torch.testing.assert_close(
        MyLoss()(image, text, scale), 2 * peers.load("open_clip").ClipLoss()(image, text, scale)
    )
