"""Every strategy against plain arithmetic, at its limits, and against what it was; nothing is read from the device."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from protloc.classify import mixing
from protloc.classify.backbone import Classifier
from protloc.classify.losses import bce
from protloc.classify.mixing import ALIGNMENTS, STRATEGIES, coral, cut_boxes, mix_shares, mmd, strategy
from protloc.core import InputError

TOGETHER = [n for n, s in STRATEGIES.items() if s.apart]
TWO_KINDS = [n for n, s in STRATEGIES.items() if s.uses == ('real', 'synthetic') and s.extra == 'synthetic']


class Linear(nn.Module):
    "A linear classifier that notes how many images of each pass were real"

    def __init__(self, pixels=2 * 4 * 4, classes=3):
        super().__init__()
        self.head, self.passes = nn.Linear(pixels, classes), []

    def features(self, images, real=None):
        self.passes.append((len(images), real))
        return images.float().flatten(1) / 255

    def forward(self, images, real=None):
        return self.head(self.features(images, real))


class Normed(Linear):
    "A linear classifier behind a BatchNorm, with a second one for synthetic images"

    def __init__(self, channels=2, **options):
        super().__init__(**options)
        self.main, self.aux = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def features(self, images, real=None):
        self.passes.append((len(images), real))
        n, x = len(images) if real is None else real, images.float()
        return torch.cat([norm(part) for norm, part in ((self.main, x[:n]), (self.aux, x[n:])) if len(part)]).flatten(1)


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)

    def batch(n, top):
        return (
            torch.randint(top, (n, 2, 4, 4), generator=g, dtype=torch.uint8),
            torch.randint(2, (n, 3), generator=g).float(),
        )

    return batch(6, 256), batch(6, 128)


def shares(monkeypatch, values):
    "Let the strategies draw these shares"
    monkeypatch.setattr(
        mixing, 'mix_shares', lambda n, alpha, device=None: torch.as_tensor(values, dtype=torch.float32).expand(n)
    )


def given(name, real, synthetic):
    "The batches as the training hands them over"
    first = STRATEGIES[name]().sources_at(0.0)
    return real if 'real' in first else None, synthetic if 'synthetic' in first else None


def cross_entropy(x, y, w, b):
    "Loss of each image, in numpy"
    p = 1 / (1 + np.exp(-(x @ w.T + b)))
    return -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1)


S = np.array([0, 0.1, 0.3, 0.5, 0.8, 1])
BY_HAND = dict(
    real=lambda l, x, u, y, v: l(x, y).mean(),
    synthetic=lambda l, x, u, y, v: l(u, v).mean(),
    concat=lambda l, x, u, y, v: (l(x, y).sum() + l(u, v).sum()) / 12,
    duplicate_real=lambda l, x, u, y, v: (l(x, y).sum() + l(u, v).sum()) / 12,
    tail_only=lambda l, x, u, y, v: (l(x, y).sum() + l(u, v).sum()) / 12,
    soft_labels=lambda l, x, u, y, v: (l(x, y).sum() + l(u, v).sum()) / 12,
    weighted=lambda l, x, u, y, v: (l(x, y).sum() + 0.5 * l(u, v).sum()) / 6,
    pretrain_finetune=lambda l, x, u, y, v: l(u, v).mean(),
    mix_loss=lambda l, x, u, y, v: (S * l(x, y) + (1 - S) * l(u, v)).mean(),
    mix_representation=lambda l, x, u, y, v: l(
        S[:, None] * x + (1 - S)[:, None] * u, S[:, None] * y + (1 - S)[:, None] * v
    ).mean(),
    input_mixup=lambda l, x, u, y, v: l(
        S[:, None] * x + (1 - S)[:, None] * u, S[:, None] * y + (1 - S)[:, None] * v
    ).mean(),
)


@pytest.mark.parametrize('name', BY_HAND)
def test_by_hand(name, batches, monkeypatch):
    (real, synthetic), model = batches, Linear()
    shares(monkeypatch, S)
    w, b = (p.detach().double().numpy() for p in (model.head.weight, model.head.bias))
    x, u, y, v = (t.double().flatten(1).numpy() for t in (real[0] / 255, synthetic[0] / 255, real[1], synthetic[1]))
    found = strategy(name).loss(model, bce, *given(name, real, synthetic))
    assert found.item() == pytest.approx(BY_HAND[name](lambda x, y: cross_entropy(x, y, w, b), x, u, y, v), rel=1e-5)


def test_cutmix_by_hand(batches, monkeypatch):
    "Pixel by pixel, box by box"
    real, synthetic = batches
    centres = torch.tensor([[0.5, 0.5], [0, 0], [1, 0.5], [0.3, 0.8], [0.5, 0.5], [0.9, 0.1]])
    shares(monkeypatch, S)
    monkeypatch.setattr(torch, 'rand', lambda *size: centres)
    images, labels = strategy('cutmix').mix(real, synthetic)
    assert images.dtype == torch.uint8
    for i, (s, (cy, cx)) in enumerate(zip(S, centres.tolist())):
        half, expected, pasted = np.sqrt(1 - s) / 2, real[0][i].clone(), 0
        for r in range(4):
            for c in range(4):
                if round((cy - half) * 4) <= r < round((cy + half) * 4) and round((cx - half) * 4) <= c < round(
                    (cx + half) * 4
                ):
                    expected[:, r, c], pasted = synthetic[0][i, :, r, c], pasted + 1
        assert torch.equal(images[i], expected)
        torch.testing.assert_close(labels[i], (1 - pasted / 16) * real[1][i] + pasted / 16 * synthetic[1][i])
    model = Linear()
    assert strategy('cutmix').loss(model, bce, real, synthetic) == bce(model(images), labels).mean()


@pytest.mark.parametrize('alpha', [0.3, 1, 5])
@pytest.mark.parametrize('edges', [(32, 32), (7, 13), (512, 512)])
def test_label_shares_of_cutmix_are_counted_pixels(alpha, edges):
    n = 500 if edges[0] < 100 else 8
    one, none = ((torch.full((n, 1, *edges), k, dtype=torch.uint8), torch.full((n, 1), float(k))) for k in (1, 0))
    torch.manual_seed(0)
    images, labels = strategy('cutmix', alpha=alpha).mix(one, none)
    torch.testing.assert_close(images.float().mean((1, 2, 3)), labels[:, 0], rtol=0, atol=1e-6)
    assert len(labels.unique()) > 3


def test_boxes_have_the_area_that_was_drawn_unless_cut_off():
    share = torch.rand(200)
    box = cut_boxes(share, torch.full((200, 2), 0.5), 256, 256)
    torch.testing.assert_close(1 - box.float().mean((1, 2, 3)), share, atol=0.01, rtol=0)
    outer = cut_boxes(share, torch.rand(200, 2), 256, 256)
    assert (outer.float().mean((1, 2, 3)) <= box.float().mean((1, 2, 3)) + 0.01).all()


@pytest.mark.parametrize('share, alone', [(1.0, 'real'), (0.0, 'synthetic')])
@pytest.mark.parametrize('name', ['mix_loss', 'mix_representation', 'input_mixup', 'cutmix'])
def test_limits(name, share, alone, batches, monkeypatch):
    "A share of 1 or 0 is training on one kind alone, and the other one's pixels get no gradient"
    shares(monkeypatch, share)
    monkeypatch.setattr(torch, 'rand', lambda *size: torch.full(size, 0.5))
    model, (real, synthetic) = Linear(), [(x.float().requires_grad_(), y) for x, y in batches]
    found = strategy(name).loss(model, bce, real, synthetic)
    torch.testing.assert_close(found, strategy(alone).loss(model, bce, real, synthetic))
    grads = dict(zip(('real', 'synthetic'), torch.autograd.grad(found, (real[0], synthetic[0]))))
    assert grads.pop(alone).abs().min() > 0
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize('name', [n for n in STRATEGIES if n not in ('real', 'synthetic', 'pretrain_finetune')])
def test_gradients_reach_both_batches_and_the_head(name, batches):
    model, (real, synthetic) = Linear(), [(x.float().requires_grad_(), y) for x, y in batches]
    torch.manual_seed(0)
    found = torch.autograd.grad(
        strategy(name).loss(model, bce, real, synthetic), (real[0], synthetic[0], *model.parameters())
    )
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found)


def test_released_and_image_shares_have_the_same_mean(batches):
    "but the released loss depends on the mean share alone"
    model, (real, synthetic) = Linear(), batches
    parts = [strategy(n).loss(model, bce, real, synthetic).item() for n in ('real', 'synthetic')]
    torch.manual_seed(0)
    with torch.no_grad():
        for released in (False, True):
            s = strategy('mix_loss', as_released=released)
            draws = torch.stack([s.loss(model, bce, real, synthetic) for _ in range(3000)])
            assert abs(draws.mean() - sum(parts) / 2) < 4 * draws.std() / 3000**0.5
        torch.manual_seed(5)
        found = s.loss(model, bce, real, synthetic)
        torch.manual_seed(5)
        share = mix_shares(6).mean().item()
    assert found.item() == pytest.approx(share * parts[0] + (1 - share) * parts[1], rel=1e-5)


def test_weights_over_the_training(batches):
    model, (real, synthetic) = Linear(), batches
    on_real, on_fake = (strategy(n).loss(model, bce, real, synthetic).item() for n in ('real', 'synthetic'))
    fades = strategy('weighted', weight=0.8, final_weight=0.2)
    for p in (0.0, 0.25, 1.0):
        assert fades.loss(model, bce, real, synthetic, torch.tensor(p)).item() == pytest.approx(
            on_real + (0.8 - 0.6 * p) * on_fake, rel=1e-5
        )
    few = tuple(t[:2] for t in synthetic)
    on_few = strategy('synthetic').loss(model, bce, None, few).item()
    assert strategy('weighted', weight=1).loss(model, bce, real, few).item() == pytest.approx(
        on_real + on_few * 2 / 6, rel=1e-5
    )
    assert strategy('weighted', weight=1).loss(model, bce, real, few).item() == pytest.approx(
        strategy('concat').loss(model, bce, real, few).item() * 8 / 6, rel=1e-5
    )


def test_sources_at():
    s, steps = strategy('pretrain_finetune', share=0.3), np.arange(10) / 10
    assert [s.sources_at(p) for p in steps] == 3 * [('synthetic',)] + 7 * [('real',)]
    for name, kind in STRATEGIES.items():
        at = {k for p in (0.0, 0.5, 1.0) for k in kind().sources_at(p)}
        assert at == set(kind.uses), name


def test_pretraining_takes_one_kind_a_step(batches):
    with pytest.raises(ValueError):
        strategy('pretrain_finetune').loss(Linear(), bce, *batches)


def test_rows_of_the_tail():
    truth = np.eye(4, dtype=np.float32)[[0] * 10 + [1] * 5 + [2] * 2]
    made = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], np.float32)
    for below, rows in ((3, [1, 3]), (0.2, [1, 3]), (6, [1, 2, 3]), (1, [3]), (0.999, [0, 1, 2, 3])):
        assert np.flatnonzero(strategy('tail_only', below=below).rows(truth, made)).tolist() == rows, below
    with pytest.raises(
        InputError,
        match='no synthetic image shows one of the 2 classes with fewer than 3 real training images: generate some',
    ):
        strategy('tail_only', below=3).rows(truth, made[:1])
    with pytest.raises(InputError, match='no class has fewer than 2 real training images: raise below'):
        strategy('tail_only', below=2).rows(truth[:15, :2], made[:, :2])
    assert strategy('concat').rows(truth, made).all()


def former(name, classifier, criterion, real, synthetic):
    "What the first five did before there were options"

    def share():
        return torch.distributions.Beta(0.3, 0.3).sample((len(real[0]),))

    if name == 'real':
        return criterion(classifier(real[0]), real[1]).mean()
    if name == 'synthetic':
        return criterion(classifier(synthetic[0]), synthetic[1]).mean()
    if name == 'concat':
        return criterion(classifier(torch.cat([real[0], synthetic[0]])), torch.cat([real[1], synthetic[1]])).mean()
    s = share()
    if name == 'mix_loss':
        return (
            s * criterion(classifier(real[0]), real[1]) + (1 - s) * criterion(classifier(synthetic[0]), synthetic[1])
        ).mean()
    s = s[:, None]
    features = s * classifier.features(real[0]) + (1 - s) * classifier.features(synthetic[0])
    return criterion(classifier.head(features), s * real[1] + (1 - s) * synthetic[1]).mean()


@pytest.mark.parametrize('name', ['real', 'synthetic', 'concat', 'mix_loss', 'mix_representation'])
def test_the_first_five_are_what_they_were_bit_for_bit(name):
    "Losses, weights and running statistics after three steps of a ResNet with dropout before the head"
    assert list(STRATEGIES)[:5] == ['real', 'synthetic', 'concat', 'mix_loss', 'mix_representation']

    def train(loss):
        torch.manual_seed(0)
        model, losses = Classifier('resnet10', 2, 3), []
        model.head = nn.Sequential(nn.Dropout(0.2), model.head)
        real, synthetic = (
            (
                torch.randint(256, (8, 2, 16, 16), dtype=torch.uint8).contiguous(memory_format=torch.channels_last),
                torch.randint(2, (8, 3)).float(),
            )
            for _ in range(2)
        )
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(3):
            torch.manual_seed(step)
            losses.append(loss(model, bce, real, synthetic))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses, model.state_dict()

    (now, weights), (then, before) = train(strategy(name).loss), train(lambda *args: former(name, *args))
    assert torch.equal(torch.stack(now), torch.stack(then))
    assert all(torch.equal(weights[k], before[k]) for k in before)


@pytest.mark.parametrize('name', STRATEGIES)
def test_who_passes_through_which_statistics(name, batches):
    "With aux_bn one pass, real images first; mixed ones count as synthetic"
    real, synthetic = batches
    if name not in TWO_KINDS:
        with pytest.raises(InputError, match='aux_bn keeps real and synthetic images apart'):
            strategy(name, aux_bn=True)
        return
    model = Normed()
    strategy(name, aux_bn=True).loss(model, bce, *given(name, real, synthetic))
    assert model.passes == [(6, 0)] if name == 'pretrain_finetune' else [(12, 6)]
    model = Normed()
    strategy(name).loss(model, bce, *given(name, real, synthetic))
    if name.startswith('mix_'):
        assert model.passes == [(6, None)] * 2
    else:
        assert model.passes == [(6 if name in ('input_mixup', 'cutmix', 'pretrain_finetune') else 12, None)]
    assert len(model.passes) == 1 or model.main.num_batches_tracked == 2


def test_real_images_pass_through_the_main_statistics(batches):
    model = Normed()
    strategy('pretrain_finetune', aux_bn=True).loss(model, bce, batches[0], None)
    assert model.passes == [(6, 6)] and model.main.num_batches_tracked == 1 and model.aux.num_batches_tracked == 0


@pytest.mark.parametrize('name', ['mix_loss', 'mix_representation'])
def test_one_pass_or_two(name, batches):
    "Without BatchNorm one pass gives what two give; with its auxiliary one too, and the running averages differ"
    real, synthetic = batches

    def found(model, s):
        torch.manual_seed(0)
        return s.loss(model, bce, real, synthetic)

    model = Linear()
    one = found(model, strategy(name))
    assert model.passes == [(12, None)]
    torch.manual_seed(0)
    torch.testing.assert_close(one, former(name, model, bce, real, synthetic))
    model = Normed()
    two, one = found(model, strategy(name)), found(model, strategy(name, aux_bn=True))
    torch.testing.assert_close(one, two)
    assert model.main.num_batches_tracked == 3 and model.aux.num_batches_tracked == 1


@pytest.mark.parametrize('name', STRATEGIES)
def test_alignment(name, batches, monkeypatch):
    "The penalty is added where there are both kinds, costs nothing where it is off, and pulls both features"
    model, (real, synthetic) = Linear(), [(x.float().requires_grad_(), y) for x, y in batches]
    if name not in TOGETHER:
        with pytest.raises(InputError, match='align compares real with synthetic images'):
            strategy(name, align=0.1)
        return

    def found(**options):
        torch.manual_seed(0)
        return strategy(name, **options).loss(model, bce, real, synthetic)

    for kind, distance in ALIGNMENTS.items():
        expected = distance(*(x.flatten(1) / 255 for x in (real[0], synthetic[0])))
        with_it = found(align=10, alignment=kind)
        penalty = with_it - found()
        torch.testing.assert_close(penalty, 10 * expected)
        grads = torch.autograd.grad(penalty, (real[0], synthetic[0]))
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads)
    monkeypatch.setattr(mixing, 'ALIGNMENTS', {})
    assert found().isfinite()


def test_distances():
    torch.manual_seed(0)
    a, b = torch.randn(40, 5), torch.randn(30, 5) * 2 + 1
    difference = np.cov(a.numpy().T) - np.cov(b.numpy().T)
    assert coral(a, b).item() == pytest.approx((difference**2).sum() / 100, rel=1e-4)
    x = np.concatenate([a, b]).astype(float)
    d = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    median = np.sort(d[np.triu_indices(70, 1)])[(70 * 69 // 2 - 1) // 2]
    k = np.mean([np.exp(-(d**2) / (2 * (w * median) ** 2)) for w in (0.25, 0.5, 1, 2, 4)], 0)
    assert mmd(a, b).item() == pytest.approx(k[:40, :40].mean() + k[40:, 40:].mean() - 2 * k[:40, 40:].mean(), rel=1e-4)
    assert mmd(a, a).abs() < 1e-6 and mmd(a, b) == mmd(10 * a, 10 * b)
    same = torch.ones(4, 5, requires_grad=True)
    for f in (coral, mmd):
        assert torch.autograd.grad(f(same, same * 1), same)[0].isfinite().all()
    assert mmd(a[:1], b[:1]).isfinite()
    with pytest.raises(InputError, match='coral needs two images of each kind'):
        coral(a[:1], b)


def test_the_penalty_is_computed_in_full_precision(batches):
    model, (real, synthetic) = Linear(), batches
    with torch.autocast('cpu', torch.bfloat16):
        found = strategy('concat', align=10).loss(model, bce, real, synthetic) - strategy('concat').loss(
            model, bce, real, synthetic
        )
    torch.testing.assert_close(found, 10 * coral(*(x.flatten(1) / 255 for x, _ in batches)), rtol=1e-5, atol=1e-6)


WAITS = [getattr(torch.ops.aten, n) for n in ('_local_scalar_dense', 'equal', 'is_nonzero', 'nonzero', 'masked_select')]


class NoSync(TorchDispatchMode):
    "Nothing may be read from the device"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS, f'a step waits for the device: {func}'
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', STRATEGIES)
def test_no_loss_waits_for_the_device(name, batches):
    options = (
        [{}]
        + [dict(align=0.1, alignment=k) for k in ALIGNMENTS if name in TOGETHER]
        + [dict(aux_bn=True)] * (name in TWO_KINDS)
    )
    options += dict(mix_loss=[dict(as_released=True)], weighted=[dict(final_weight=0)]).get(name, [])
    for o in options:
        s, model, b = strategy(name, **o), Normed(), given(name, *batches)
        with NoSync():
            s.loss(model, bce, *b, torch.tensor(0.5)).backward()


@pytest.mark.parametrize(
    'name', [n for n in STRATEGIES if not STRATEGIES[n].pairs and n not in ('real', 'synthetic', 'pretrain_finetune')]
)
def test_batches_of_other_sizes(name, batches):
    "Any ratio where images are not mixed one to one"
    real, synthetic = batches
    for s in (strategy(name), *([strategy(name, aux_bn=True, align=0.1)] if name in TOGETHER else [])):
        assert s.loss(Normed(), bce, real, tuple(t[:2] for t in synthetic)).isfinite()


def test_strategies_hold_no_state(batches):
    for name in STRATEGIES:
        s = strategy(name)
        before = s.model_dump()
        s.loss(Linear(), bce, *given(name, *batches))
        assert s.model_dump() == before and s == strategy(name)
        with pytest.raises(ValueError, match='frozen'):
            s.align = 1


@pytest.mark.parametrize(
    'name, options, told',
    [
        ('mixloss', {}, "did you mean 'mix_loss'"),
        ('mix_loss', dict(alfa=1), "did you mean 'alpha'"),
        ('mix_loss', dict(alpha=0), "'alpha' is wrong"),
        ('weighted', dict(weight=-1), "'weight' is wrong"),
        ('pretrain_finetune', dict(share=1), "'share' is wrong"),
        ('tail_only', dict(below=0), "'below' is wrong"),
        ('concat', dict(align=-1), "'align' is wrong"),
        ('concat', dict(align=1, alignment='coal'), "'alignment' is wrong"),
        ('real', dict(alpha=1), "there is no setting 'alpha'"),
    ],
)
def test_wrong_options_are_told(name, options, told):
    with pytest.raises(InputError, match=told) as e:
        strategy(name, **options)
    assert '\n' not in str(e.value)
