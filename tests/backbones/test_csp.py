import copy
import io
import pickle
from functools import partial
from itertools import product

import pytest
import torch
from timm.models.cspnet import CrossStage, CrossStage3, DarkBlock
from torch import nn
from torch.nn import functional as F

from common import out

from backbones_nb.backbones.csp import CSPStage, OneConv, TwoConvs
from backbones_nb.backbones.csp_convert import convert_split, swap_order
from backbones_nb.core.layers import ConvNormAct, init_cnn
from backbones_nb.analysis.parity import map_weights, randomize_, rel_error

transitions, orders, splits = ('first', 'last', 'both'), ('blocks', 'cross'), ('convs', 'slice')
other = dict(convs='slice', slice='convs')


def noise(c=32, h=13, w=10, n=2, seed=1):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed))


def make(*args, **kw):
    args = args or (32, 64, 2)
    return randomize_(CSPStage(*args, **kw), x=noise(args[0])).eval()


def same(a, b):  # keys in order, tensors bit by bit
    a, b = [o.state_dict() if isinstance(o, nn.Module) else o for o in (a, b)]
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def naive(sd, x, order, eps=1e-5):
    "A stage from its state dict by formulas: down, split, post and fuse are there where the state dict has them."

    def unit(k, x, stride=1):
        w = sd[f'{k}.conv.weight']
        g, b, m, v = (sd[f'{k}.norm.{o}'][:, None, None] for o in ('weight', 'bias', 'running_mean', 'running_var'))
        y = (F.conv2d(x, w, stride=stride, padding=w.shape[2] // 2) - m) / (v + eps).sqrt() * g + b
        return torch.where(y > 0, y, 0.1 * y)

    has = lambda k: f'{k}.conv.weight' in sd
    if has('down'):
        x = unit('down', x, 2)
    if has('split.both'):
        y = unit('split.both', x)
        cross, main = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
    else:
        cross, main = unit('split.cross', x), unit('split.main', x)
    for i in sorted({int(k.split('.')[1]) for k in sd if k.startswith('blocks.')}):
        main = main + unit(f'blocks.{i}.conv2', unit(f'blocks.{i}.conv1', main))
    if has('post'):
        main = unit('post', main)
    y = torch.cat([main, cross] if order == 'blocks' else [cross, main], 1)
    return unit('fuse', y) if has('fuse') else y


# --- the stage

grid = list(product(splits, orders, transitions, (True, False)))


@pytest.mark.parametrize('split,order,transition,down', grid)
def test_equals_the_formulas(split, order, transition, down):
    m = make(32, 64, 2, split, order, transition, down=down).double()
    for h, w in ((13, 10), (8, 8), (1, 1)):
        x = noise(32, h, w).double()
        assert rel_error(out(m, x), naive(m.state_dict(), x, order)) < 1e-12
        assert out(m, x).shape == (2, 64, *((((h + 1) // 2), (w + 1) // 2) if down else (h, w)))


@pytest.mark.parametrize('kw', [dict(expand=2, hidden=32), dict(expand=0.5), dict(hidden=7), dict(expand=1.5)], ids=str)
@pytest.mark.parametrize('split', splits)
def test_widths(split, kw):
    m, half = make(32, 64, 1, split, **kw), int(64 * kw.get('expand', 1)) // 2
    assert out(m, noise()).shape == (2, 64, 7, 5) and m.blocks[0].conv1.conv.weight.shape[:2] == (
        kw.get('hidden', half),
        half,
    )
    assert rel_error(out(m, noise()), naive(m.state_dict(), noise(), 'blocks')) < 1e-5


@pytest.mark.parametrize('n', (0, 1, 3))
def test_number_of_blocks(n):
    m = make(32, 64, n)
    assert len(m.blocks) == n and rel_error(out(m, noise()), naive(m.state_dict(), noise(), 'blocks')) < 1e-5


@pytest.mark.parametrize('transition,fixed', [('both', 2.25), ('first', 2), ('last', 1.25)])
def test_parameters(transition, fixed):
    c, n = 64, 3
    for s in splits:
        convs = sum(
            p.numel() for p in CSPStage(c, c, n, s, transition=transition, down=False).parameters() if p.dim() == 4
        )
        assert convs == (2.5 * n + fixed) * c * c


def test_children_and_keys():
    assert [n for n, _ in CSPStage(8, 16, 1).named_children()] == ['down', 'split', 'blocks', 'post', 'fuse']
    assert [n for n, _ in CSPStage(8, 16, 1, transition='first', down=False).named_children()] == [
        'split',
        'blocks',
        'fuse',
    ]
    assert isinstance(CSPStage(8, 16, 1).split, TwoConvs) and isinstance(CSPStage(8, 16, 1, 'slice').split, OneConv)
    keys = CSPStage(8, 16, 1).state_dict()
    for k in (
        'down.conv.weight',
        'split.cross.norm.running_var',
        'split.main.conv.weight',
        'blocks.0.conv2.conv.weight',
        'post.norm.bias',
        'fuse.conv.weight',
    ):
        assert k in keys
    assert 'split.both.norm.num_batches_tracked' in CSPStage(8, 16, 1, 'slice').state_dict()


def test_a_block_of_ones_own():
    class Plain(nn.Module):
        def __init__(self, nf, hidden, act, norm):
            super().__init__()
            self.conv = ConvNormAct(nf, nf, 3, act=act, norm=norm)

        def forward(self, x):
            return self.conv(x)

    m = make(32, 64, 2, block=Plain)
    assert rel_error(out(convert_split(m, 'slice'), noise()), out(m, noise())) < 1e-6


def test_first_half_of_the_slice_is_the_cross_half():
    m = make(32, 64, 1, 'slice', 'blocks', 'last', down=False)
    assert rel_error(out(m, noise())[:, 32:], out(m.split.both, noise())[:, :32]) == 0


def test_gradients_of_the_cross_half_pass_the_blocks_by_only_with_fusion_last():
    for t in transitions:
        m = make(32, 64, 1, transition=t, down=False)
        m(noise())[:, 32:].sum().backward()
        assert bool(m.blocks[0].conv1.conv.weight.grad.any()) == (t != 'last')


@pytest.mark.parametrize(
    'kw,text',
    [
        (dict(split='chunk'), "'convs', 'slice'"),
        (dict(order='main'), "'blocks', 'cross'"),
        (dict(transition='none'), "'first', 'last', 'both'"),
        (dict(expand=1.01), 'even number of channels'),
        (dict(expand=0), 'even number'),
        (dict(transition='last', expand=2), "transition='last'"),
        (dict(act='leaky'), 'act'),
    ],
    ids=str,
)
def test_errors(kw, text):
    with pytest.raises(ValueError) as e:
        CSPStage(32, 64, 1, **kw)
    assert text in str(e.value) and '\n' not in str(e.value)


# --- parity with timm

timm_kw = dict(
    stride=2,
    dilation=1,
    block_ratio=0.5,
    block_fn=DarkBlock,
    act_layer=partial(nn.LeakyReLU, 0.1),
    norm_layer=nn.BatchNorm2d,
    down_growth=True,
)


@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize('depth', (1, 3))
@pytest.mark.parametrize(
    'cls,config,first',
    [(CrossStage, dict(order='cross'), 'cross'), (CrossStage3, dict(transition='first'), 'main')],
    ids=('CrossStage', 'CrossStage3'),
)
def test_parity_with_timm(cls, config, first, depth, split):
    ref = randomize_(cls(32, 64, depth=depth, **timm_kw), x=noise()).eval()
    sd = map_weights(ref, CSPStage(32, 64, depth, 'slice', **config)).state_dict()
    m = CSPStage(32, 64, depth, split, **config).eval()
    sd = convert_split(sd, 'convs', first=first)
    m.load_state_dict(sd if split == 'convs' else convert_split(sd, 'slice'))
    assert rel_error(out(m, noise()), out(ref, noise())) <= 1e-5
    if first == 'main':  # the wrong order of the halves must show
        m.load_state_dict(convert_split(convert_split(sd, 'slice', first='main'), split))
        assert rel_error(out(m, noise()), out(ref, noise())) > 0.1


def test_parity_with_timm_in_the_wide_first_stage():
    ref = randomize_(
        CrossStage(32, 64, depth=1, expand_ratio=2.0, bottle_ratio=0.5, **(timm_kw | dict(block_ratio=1.0))), x=noise()
    ).eval()
    m = map_weights(ref, CSPStage(32, 64, 1, 'slice', 'cross', expand=2, hidden=32)).eval()
    for o in (m, convert_split(m, 'convs')):
        assert rel_error(out(o, noise()), out(ref, noise())) <= 1e-5


# --- conversion


@pytest.mark.parametrize('split,order,transition,down', grid)
def test_conversion(split, order, transition, down):
    m, to = make(32, 64, 2, split, order, transition, down=down), other[split]
    before = copy.deepcopy(m)
    there = convert_split(m, to)
    built = CSPStage(32, 64, 2, to, order, transition, down=down).eval()
    built.load_state_dict(convert_split(m.state_dict(), to), strict=True)
    assert rel_error(out(there, noise()), out(m, noise())) <= 1e-6 and torch.equal(
        out(there, noise()), out(built, noise())
    )
    assert repr(there) == repr(built) and same(there, built) and same(there, convert_split(m.state_dict(), to))
    assert same(m, before) and repr(m) == repr(before)  # untouched
    assert same(convert_split(there, split), m) and same(convert_split(there.state_dict(), split), m)
    assert same(convert_split(m, split), m) and same(convert_split(m.state_dict(), split), m)  # nothing to do


def test_nothing_is_shared():
    for s in splits:
        m = make(split=s)
        ptrs = {t.untyped_storage().data_ptr() for t in m.state_dict().values()}
        new = convert_split(m, other[s]).state_dict()
        assert not ptrs & {t.untyped_storage().data_ptr() for t in new.values()}
        for k, t in convert_split(m.state_dict(), other[s]).items():
            if 'split.' in k:
                assert (
                    t.untyped_storage().nbytes() == t.nbytes and t.untyped_storage().data_ptr() not in ptrs
                )  # no view


def test_batch_norm_is_converted_too():
    "Without running statistics the net would be another function: each of the four vectors must arrive in its place."
    two = make()
    one = convert_split(two, 'slice')
    for n in ('weight', 'bias', 'running_mean', 'running_var'):
        whole = getattr(one.split.both.norm, n)
        assert torch.equal(whole[:32], getattr(two.split.cross.norm, n)) and torch.equal(
            whole[32:], getattr(two.split.main.norm, n)
        )
        broken = copy.deepcopy(one)
        getattr(broken.split.both.norm, n).data.copy_(whole.flip(0))
        assert rel_error(out(broken, noise()), out(two, noise())) > 1e-3
    assert one.split.both.norm.num_features == 64 and one.split.both.conv.out_channels == 64


@pytest.mark.parametrize('split', splits)
def test_what_a_state_dict_does_not_tell(split):
    m = make(split=split, act='silu').double().train()
    for u in m.split.children():
        u.norm.eps, u.norm.momentum = 1e-3, 0.03
        u.conv.weight.requires_grad_(False)
    new = convert_split(m, other[split])
    assert all(o.training for o in new.modules()) and not any(
        o.training for o in convert_split(copy.deepcopy(m).eval(), other[split]).modules()
    )
    for u in new.split.children():
        assert (
            u.norm.eps == 1e-3
            and u.norm.momentum == 0.03
            and u.conv.weight.dtype == torch.float64
            and isinstance(u.act, nn.SiLU)
        )
        assert not u.conv.weight.requires_grad and u.norm.weight.requires_grad
    assert rel_error(out(new, noise().double()), out(m, noise().double())) < 1e-12


@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize(
    'optim',
    [partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3), partial(torch.optim.Adam, lr=1e-3)],
    ids=('sgd', 'adam'),
)
def test_both_forms_train_alike(split, optim):
    torch.manual_seed(0)
    a = init_cnn(CSPStage(32, 64, 2, split)).double().train()
    b = convert_split(a, other[split])
    for m in (a, b):
        opt = optim(m.parameters())
        for i in range(4):
            loss = (m(noise(seed=i).double()) - noise(64, 7, 5, seed=9).double()).pow(2).mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
    b = convert_split(b, split)
    assert rel_error(out(b.eval(), noise().double()), out(a.eval(), noise().double())) < 1e-6
    assert int(a.blocks[0].conv1.norm.num_batches_tracked) == 4 and all(
        rel_error(p, q) < 1e-6 for p, q in zip(b.buffers(), a.buffers()) if p.dim()
    )


@pytest.mark.parametrize('norm', ('bn', None))
def test_without_a_norm(norm):
    m = make(norm=norm)
    one = convert_split(m, 'slice')
    assert rel_error(out(one, noise()), out(m, noise())) <= 1e-6 and same(convert_split(one, 'convs'), m)
    assert ('split.both.conv.bias' in one.state_dict()) == (norm is None)


def net(split):
    return nn.Sequential(
        ConvNormAct(3, 16),
        nn.ModuleDict(dict(a=CSPStage(16, 32, 1, split)))['a'],
        nn.Sequential(CSPStage(32, 64, 2, split, 'cross', 'first'), nn.Conv2d(64, 8, 1)),
    )


@pytest.mark.parametrize('split', splits)
def test_whole_nets(split):
    m = randomize_(net(split)).eval()
    new, x = convert_split(m, other[split]), noise(3, 32, 32)
    assert rel_error(out(new, x), out(m, x)) <= 1e-6 and repr(new) == repr(net(other[split]).eval())
    built = net(other[split]).eval()
    built.load_state_dict(convert_split(m.state_dict(), other[split]), strict=True)
    assert same(built, new) and same(convert_split(new, split), m)


def test_state_dict_under_a_prefix():
    sd = {f'body.stages.0.{k}': v for k, v in make().state_dict().items()} | {
        'head.weight': torch.ones(3),
        'split.x': torch.ones(1),
    }
    new = convert_split(sd, 'slice')
    assert (
        'body.stages.0.split.both.conv.weight' in new and new['head.weight'] is sd['head.weight'] and 'split.x' in new
    )
    assert same(convert_split(new, 'convs'), sd)


def without(sd, *names):
    return {k: v for k, v in sd.items() if not k.endswith(names)}


@pytest.mark.parametrize(
    'what,text',
    [
        (lambda: convert_split(make(), 'chunk'), "'convs', 'slice'"),
        (lambda: convert_split(make().state_dict(), 'slice', first='blocks'), "'cross', 'main'"),
        (lambda: convert_split(make(), 'slice', first='main'), 'state dict'),
        (lambda: convert_split(nn.Conv2d(3, 8, 1), 'slice'), 'without a CSPStage'),
        (lambda: convert_split(nn.Conv2d(3, 8, 1).state_dict(), 'slice'), 'without a key'),
        (lambda: convert_split(without(make().state_dict(), 'split.main.norm.bias'), 'slice'), 'norm.bias'),
        (lambda: convert_split(CSPStage(64, 64, 1, norm='gn'), 'slice'), 'batch norm'),
        (lambda: convert_split(CSPStage(64, 64, 1, 'slice', norm='gn'), 'convs'), 'batch norm'),
        (lambda: convert_split(CSPStage(64, 64, 1, norm='gn').state_dict(), 'slice'), 'batch norm'),
        (lambda: convert_split(CSPStage(64, 64, 1, act=nn.PReLU), 'slice'), 'act.weight'),
        (lambda: swap_order(make(transition='last')), "transition='last'"),
        (lambda: swap_order(make(transition='last').state_dict()), 'transition'),
        (lambda: swap_order(nn.Conv2d(3, 8, 1)), '0 CSPStages'),
        (lambda: swap_order({}), '0 splits'),
    ],
)
def test_conversion_errors(what, text):
    with pytest.raises(ValueError) as e:
        what()
    assert text in str(e.value) and '\n' not in str(e.value)


def test_unequal_halves_are_refused():
    m = make()
    m.split.main.norm.eps = 1e-3
    with pytest.raises(ValueError, match='differ'):
        convert_split(m, 'slice')
    m = make()
    m.split.main.norm.num_batches_tracked += 1
    with pytest.raises(ValueError, match='numbers of batches'):
        convert_split(m, 'slice')


# --- order


@pytest.mark.parametrize('split,order,transition', [*product(splits, orders, ('first', 'both'))])
def test_swap_order(split, order, transition):
    m = make(32, 64, 2, split, order, transition)
    new, turned = swap_order(m), dict(zip(orders, orders[::-1]))[order]
    built = CSPStage(32, 64, 2, split, turned, transition).eval()
    built.load_state_dict(swap_order(m.state_dict()), strict=True)
    wrong = CSPStage(32, 64, 2, split, turned, transition).eval()
    wrong.load_state_dict(m.state_dict(), strict=True)
    want = out(m, noise())
    assert new.order == turned and m.order == order and same(new, built) and same(swap_order(new), m)
    assert (
        max(rel_error(out(o, noise()), want) for o in (new, built)) < 1e-5
        and rel_error(out(wrong, noise()), want) > 0.1
    )


def test_swap_order_of_a_net():
    m, x = randomize_(net('convs')).eval(), noise(3, 32, 32)
    assert rel_error(out(swap_order(m), x), out(m, x)) < 1e-5 and [
        o.order for o in swap_order(m).modules() if isinstance(o, CSPStage)
    ] == ['cross', 'blocks']


# --- copies, files, graphs


@pytest.mark.parametrize('split', splits)
def test_copies(split):
    m = make(split=split)
    f = io.BytesIO()
    torch.save(m.state_dict(), f)
    f.seek(0)
    loaded = CSPStage(32, 64, 2, split).eval()
    loaded.load_state_dict(torch.load(f, weights_only=True))
    for o in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), loaded):
        assert torch.equal(out(o, noise()), out(m, noise()))


@pytest.mark.parametrize('split,transition', [*product(splits, transitions)])
def test_gradients_reach_every_parameter(split, transition):
    m = CSPStage(32, 64, 2, split, transition=transition)
    (m(noise()) * noise(64, 7, 5)).sum().backward()
    assert [
        n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ] == []


@pytest.mark.parametrize('split', splits)
@pytest.mark.parametrize('converted', (pytest.param(False, marks=pytest.mark.slow), True))
def test_graphs(split, converted):
    torch._dynamo.reset()
    m = convert_split(make(split=other[split]), split) if converted else make(split=split)
    x, want = noise(), out(m, noise())
    assert rel_error(out(torch.compile(m, backend='eager', fullgraph=True), x), want) < 1e-6
    assert rel_error(out(torch.export.export(m, (x,)).module(), x), want) < 1e-6


@pytest.mark.parametrize(
    'change',
    [lambda t: t.to(torch.bfloat16), lambda t: t.to(memory_format=torch.channels_last)],
    ids=('bfloat16', 'channels_last'),
)
def test_other_formats(change):
    for s in splits:
        m = make(split=s)
        got = out(change(copy.deepcopy(m)), change(noise()))
        assert rel_error(got.float(), out(m, noise())) < (0.1 if got.dtype == torch.bfloat16 else 1e-5)
