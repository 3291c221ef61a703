import matplotlib
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from backbones_nb.analysis.boxes import (
    _InsideText,
    draw_boxes,
    feature_grid,
    _image_array,
    image_tensor,
    show_side_by_side,
)
from backbones_nb.analysis.diagram import draw_blocks, draw_module_graph, module_graph
from backbones_nb.analysis.draw import draw_backbone, _stages_of
from backbones_nb.analysis.layout import layered, measure_grid, polyline, route_edges
from backbones_nb.analysis.palette import class_color
from backbones_nb.analysis.sample import sample_image, sample_target
from backbones_nb.core.features import Backbone, as_backbone, feature_row
from backbones_nb.core.layers import ConvNormAct


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def rects(ax):
    return [p for p in ax.patches if p.get_gid() == 'box']


def corners_of(ax):
    return [[*p.get_bbox().p0, *p.get_bbox().p1] for p in rects(ax)]


class Net(Backbone):
    def __init__(self, strides=None, chs=(8, 16, 24, 32, 40)):
        super().__init__()
        names = [f'stage{i + 1}' for i in range(5)]
        for n, ni, nf in zip(names, (3, *chs), chs):
            self.add_module(n, ConvNormAct(ni, nf, stride=2))
        rows = [feature_row(c, 2 ** (i + 1), o) for i, (o, c) in enumerate(zip(names, chs))]
        self.set_trunk({o: [o] for o in names}, rows, strides)


@pytest.mark.parametrize('size', [32, 97, 224])
def test_sample_ground_truth(size):
    im, t = sample_image(size), sample_target(size)
    assert im.size == (size, size) and im.mode == 'RGB' and sample_image(size).tobytes() == im.tobytes()
    assert t['masks'].dtype == torch.uint8 and t['masks'].shape == (2, size, size) and t['labels'].tolist() == [1, 2]
    for m, b in zip(t['masks'].bool(), t['boxes'].long().tolist()):
        x0, y0, x1, y1 = b
        inside = torch.zeros_like(m)
        inside[y0:y1, x0:x1] = True
        assert not (m & ~inside).any() and m[y0].any() and m[y1 - 1].any() and m[:, x0].any() and m[:, x1 - 1].any()
    assert not (t['masks'][0] & t['masks'][1]).any()


def test_seeds_change_the_background_only():
    a, b, pets = (
        *(np.asarray(sample_image(96, s)).astype(int) for s in (0, 1)),
        sample_target(96)['masks'].bool().any(0),
    )
    core = (
        nn.functional.max_pool2d(1 - pets.float()[None, None], 9, 1, 4)[0, 0] == 0
    )  # well within, where nothing shines through
    assert (a != b).any() and core.sum() > 500 and (a == b)[core.numpy()].all()


forms = dict(
    pil=Image.fromarray,
    array=lambda a: a,
    floats=lambda a: a / 255,
    tensor=lambda a: torch.from_numpy(a / 255).permute(2, 0, 1),
    byte_tensor=lambda a: torch.from_numpy(a).permute(2, 0, 1),
    float32=lambda a: torch.from_numpy(a).permute(2, 0, 1).float() / 255,
)


@pytest.mark.parametrize('form', forms)
def test_image_forms(form):
    a = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.abs(_image_array(forms[form](a)) - a / 255).max() < 1e-6
    assert image_tensor(forms[form](a)).shape == (1, 3, 5, 7)


@pytest.mark.parametrize(
    'bad',
    [
        np.zeros((3, 5, 7)),
        torch.zeros(2, 3, 5, 7),
        torch.zeros(5, 7),
        torch.full((3, 4, 4), 255.0),
        -torch.ones(3, 4, 4),
    ],
)
def test_bad_images_are_refused_in_one_sentence(bad):
    with pytest.raises(ValueError, match='^got .*, expected .*: ') as e:
        _image_array(bad)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'box', [(0, 0, 12, 9), (110, -3, 130, 20), (60, 84, 128, 96), (-9, 40, 4, 99), (0, 0, 128, 96), (120, 90, 127, 95)]
)
@pytest.mark.parametrize('figsize', [(2, 2), (6, 3)])
def test_labels_stay_inside(box, figsize):
    fig, ax = plt.subplots(figsize=figsize)
    draw_boxes(
        np.zeros((96, 128, 3)), dict(boxes=torch.tensor([box]).float(), labels=[1], scores=[0.5]), ['', 'cat'], ax
    )
    fig.canvas.draw()
    (t,), room = ax.findobj(_InsideText), ax.bbox
    b = t.get_window_extent()
    assert corners_of(ax) == [list(box)] and t.get_text() == 'cat 0.50'
    assert room.x0 <= b.x0 and b.x1 <= room.x1 and room.y0 <= b.y0 and b.y1 <= room.y1


def test_labels_do_not_overlap():
    boxes = torch.tensor([[10, 20, 60, 80], [12, 21, 62, 82], [11, 22, 58, 78.0]])
    ax = draw_boxes(np.zeros((100, 100, 3)), dict(boxes=boxes, labels=[1, 2, 3], scores=[0.9, 0.8, 0.7]))
    ax.figure.canvas.draw()
    bs = [t.get_window_extent() for t in ax.findobj(_InsideText)]
    assert len(bs) == 3 and not any(a.overlaps(b) for i, a in enumerate(bs) for b in bs[:i])


no = torch.zeros


@pytest.mark.parametrize(
    'target',
    [
        dict(boxes=[]),
        dict(boxes=no(0, 4), masks=None),
        dict(boxes=no(0, 4), labels=no(0), scores=no(0), masks=no(0, 1, 9, 9)),
    ],
)
def test_empty_targets(target):
    assert rects(draw_boxes(np.zeros((9, 9, 3)), target)) == []


@pytest.mark.parametrize('soft', [False, True])
def test_masks_and_threshold(soft):
    t = sample_target(64)
    m = t['masks'][:, None].float() * 0.9 + 0.02 if soft else t['masks']
    p = dict(boxes=t['boxes'].requires_grad_(), labels=t['labels'], masks=m, scores=torch.tensor([0.3, 0.8]))
    ax = draw_boxes(sample_image(64), p)
    assert len(ax.images) == 3
    for im, mask in zip(ax.images[1:], t['masks'].bool().numpy()):
        assert ((im.get_array()[..., 3] > 0) == mask).all()
    ax = draw_boxes(sample_image(64), p, score_thr=0.5)
    assert corners_of(ax) == [t['boxes'][1].tolist()] and len(ax.images) == 2
    assert len(draw_boxes(sample_image(64), p, masks=False).images) == 1
    assert ax.get_xlim() == (0, 64) and ax.get_ylim() == (64, 0)
    (line,) = ax.collections  # the outline encloses the mask
    (x0, y0), (x1, y1) = line.get_datalim(ax.transData).get_points()
    assert np.allclose([x0, y0, x1, y1], t['boxes'][1].tolist(), atol=0.5)


def test_class_names_are_no_formulas():
    target = dict(boxes=torch.tensor([[5.0, 30.0, 50.0, 60.0]]), labels=[1], scores=[0.5])
    ax = draw_boxes(np.zeros((64, 64, 3)), target, ['background', '$5_$10'])
    ax.figure.canvas.draw()
    assert [o.get_text() for o in ax.findobj(_InsideText)] == ['$5_$10 0.50']


def test_colors_follow_classes():
    ax = draw_boxes(np.zeros((9, 9, 3)), dict(boxes=[[0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 6, 6]], labels=[2, 1, 2]))
    assert [p.get_edgecolor()[:3] for p in rects(ax)] == [class_color(i) for i in (2, 1, 2)]


@pytest.mark.parametrize('n,ncols,pairs', [(1, 2, True), (3, 2, True), (5, 3, False), (4, 1, True)])
def test_side_by_side(n, ncols, pairs):
    ims, t = [np.full((8, 12, 3), 0.5)] * n, [dict(boxes=[[0, 0, 4, 4]], labels=[1])] * n
    f = show_side_by_side(ims, t, [o | dict(scores=[0.9]) for o in t] if pairs else None, ncols=ncols)
    assert len(f.axes) == n * (1 + pairs) and all(len(rects(a)) == 1 for a in f.axes)
    for a in f.axes:
        box = a.get_window_extent()
        assert abs(box.width / box.height - 1.5) < 0.1  # the cell has the shape of the image: no wasted space


@pytest.mark.parametrize('n,ncols,figsize', [(1, 1, None), (3, 2, None), (4, 2, (8, 5)), (2, 1, (5, 6))])
def test_captions_stand_below_their_images(n, ncols, figsize):
    ims, t = [np.full((8, 12, 3), 0.5)] * n, [dict(boxes=[[0, 0, 4, 4]])] * n
    f = show_side_by_side(
        ims,
        t,
        [o | dict(scores=[0.9]) for o in t],
        ncols=ncols,
        figsize=figsize,
        captions=[f'image {i}\nloss' for i in range(n)],
    )
    f.canvas.draw()
    texts = [t for a in f.axes for t in a.texts if 'loss' in t.get_text()]
    assert [t.get_text() for t in texts] == [f'image {i}\nloss' for i in range(n)]
    for t in texts:
        box = t.get_window_extent()
        assert box.y1 <= t.axes.get_window_extent().y0 and box.y0 >= 0
        assert not any(box.overlaps(a.get_window_extent()) for a in f.axes)


def test_masks_side_by_side_can_be_left_out():
    t = sample_target(32)
    count = lambda **kw: [
        len(a.images) for a in show_side_by_side([sample_image(32)], [t], [t | dict(scores=[0.9, 0.9])], **kw).axes
    ]
    assert count() == [3, 3] and count(masks=False) == [1, 1]


@pytest.mark.parametrize('args', [([], []), ([np.zeros((4, 4, 3))], []), ([np.zeros((4, 4, 3))], None, [])])
def test_side_by_side_counts(args):
    with pytest.raises(ValueError, match='one dict per image'):
        show_side_by_side(*args)


def test_feature_grid():
    maps = [torch.randn(1, 6, 16, 24), torch.randn(1, 9, 8, 12)]
    f = feature_grid(maps, np.zeros((64, 96, 3)), n=2)
    assert [a.get_title() for a in f.axes][:3] == ['image\n3×64×96', 'stride 4\n6×16×24', 'stride 8\n9×8×12']
    best = maps[0][0].flatten(1).std(1).argmax()
    assert np.allclose(f.axes[1].images[0].get_array(), maps[0][0, best])
    assert feature_grid({'a': maps[0]}).axes[0].get_title() == '6×16×24'


def test_rows_of_a_feature_grid_are_equally_high():
    maps = [torch.rand(1, 6, 16, 24)] * 2
    one, two = (feature_grid(maps, n=n).get_size_inches()[1] for n in (1, 2))
    assert two - 0.5 == pytest.approx(2 * (one - 0.5))  # half an inch for the titles
    assert one - 0.5 == pytest.approx(8.4 / 2 * 16 / 24)


def test_a_gap_widens_with_the_arrows_that_turn_in_it():
    nodes = {f'{k}{i}': (i, j, 'box') for j, k in enumerate('st') for i in range(3)}
    width = []
    for n in range(4):
        edges = [(f's{i}', f't{i}', '', 'right' if i < n else 'straight') for i in range(3)]
        width.append(measure_grid(nodes, route_edges(nodes, edges), 9.5).width)
    assert np.diff(width) == pytest.approx([0, 9.5 / 72, 9.5 / 72])  # the first turn has room already


@pytest.mark.parametrize('size', [64, (48, 96), (50, 70)])
@pytest.mark.parametrize('strides', [None, 32, (8, 16)])
def test_backbone_diagram_is_measured(size, strides):
    net = Net(strides)
    net.stage3.eval()
    was, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    ax = draw_backbone(net, size)
    assert modes == [m.training for m in net.modules()] and all(
        torch.equal(v, net.state_dict()[k]) for k, v in was.items()
    )
    assert not any(m._forward_hooks for m in net.modules())
    hw = (size, size) if isinstance(size, int) else size
    texts = [t.get_text() for t in ax.texts]
    for m in net.eval().get_feature_maps(torch.zeros(1, 3, *hw)):
        assert '×'.join(map(str, m.shape[1:])) in texts
    assert [t for t in texts if t in ('C1', 'C2', 'C3', 'C4', 'C5')] == [f'C{s.bit_length() - 1}' for s in net.strides]


def test_backbone_diagram_of_others():
    body = nn.Sequential(ConvNormAct(3, 4, stride=2), ConvNormAct(4, 4, stride=2))
    stages, maps = _stages_of(as_backbone(body), (32, 32))
    assert [(o['shape'], o['stride'], o['tag']) for o in stages] == [((4, 8, 8), 4, 'C2')] and maps[0].shape == (
        1,
        4,
        8,
        8,
    )
    draw_backbone(Net().to('meta'))
    with pytest.raises(TypeError, match='as_backbone'):
        draw_backbone(body)


@pytest.mark.parametrize('extra', [0, 1, 2])
def test_neck_levels_are_drawn(extra):
    class Neck(nn.Module):
        def forward(self, maps):
            return [m[:, :5] for m in maps] + [maps[-1][:, :5, :: 2 ** (i + 1), :: 2 ** (i + 1)] for i in range(extra)]

    class Carrier(nn.Module):
        has_neck = True

        def __init__(self):
            super().__init__()
            self.body, self.neck = Net(), Neck()

    ax = draw_backbone(Carrier(), 256)
    texts = [t.get_text() for t in ax.texts]
    assert (
        [t for t in texts if t[0] == 'P'] == [f'P{i + 2}' for i in range(4 + extra)]
        and 'Neck' in texts
        and '5×64×64' in texts
    )
    lim = ax.get_xlim()
    assert all(lim[0] <= p.get_bbox().x0 and p.get_bbox().x1 <= lim[1] for p in ax.patches if p.get_gid() == 'block')


# --- diagrams


def hits(nodes, edges):
    es = route_edges(nodes, [(*e, *('', None)[len(e) - 2 :]) for e in edges])
    g, res = measure_grid(nodes, es, 9.5), set()
    for e in es:
        pts = polyline(e, es, g)
        for p, q in zip(pts, pts[1:]):
            for x, y in np.linspace(p, q, 100)[1:-1]:
                res |= {
                    (e['s'], e['t'], n)
                    for n, (cx, cy, w, h) in g.at.items()
                    if abs(x - cx) < w / 2 - 1e-6 and abs(y - cy) < h / 2 - 1e-6
                }
    return res


@pytest.mark.parametrize('seed', range(12))
def test_arrows_never_cross_boxes(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(4, 14))

    def text():
        return 'conv\n' * int(rng.integers(1, 3)) + 'x' * int(rng.integers(1, 9))

    nodes = {f'n{i}': dict(text=text(), kind='layer', shape=(1, 8, 8, 2 ** int(rng.integers(2, 5)))) for i in range(n)}
    edges = [
        (f'n{i}', f'n{j}', '') for j in range(1, n) for i in set(rng.integers(0, j, int(rng.integers(1, 4))).tolist())
    ]
    place = layered(nodes, edges)
    assert len(set(place.values())) == n and all(place[s][1] < place[t][1] for s, t, _ in edges)
    boxes = {k: (*place[k], v['text'], 'layer') for k, v in nodes.items()}
    assert hits(boxes, edges) == set()
    ax = draw_blocks(boxes, edges)
    assert {p.get_gid() for p in ax.patches} == {*nodes, *(f'{s}->{t}' for s, t, _ in edges)}


class OSA(nn.Module):
    def __init__(self, n, c=4):
        super().__init__()
        self.layers, self.last = nn.ModuleList(ConvNormAct(c, c) for _ in range(n)), ConvNormAct(c * (n + 1), c, 1)

    def forward(self, x):
        outs = [x]
        for l in self.layers:
            outs.append(l(outs[-1]))
        return self.last(torch.cat(outs, 1))


@pytest.mark.parametrize('n', [1, 3, 5, 9])
def test_osa_graph(n):
    block, x = OSA(n), torch.randn(1, 4, 8, 8)
    was = {k: v.clone() for k, v in block.state_dict().items()}
    nodes, edges = module_graph(block, x)
    assert (
        sum(t == 'cat' for _, t, _ in edges) == n + 1
        and nodes['cat']['shape'] == (1, 4 * (n + 1), 8, 8)
        and len(nodes) == n + 4
    )
    assert block.training and all(torch.equal(v, block.state_dict()[k]) for k, v in was.items())
    boxes = {k: (*v, nodes[k]['text'], 'layer') for k, v in layered(nodes, edges).items()}
    assert hits(boxes, edges) == set()


def test_shapes_of_the_graph_are_those_of_the_modules():
    block, seen, x = torchvision.models.resnet18().layer2[0].eval(), {}, torch.randn(1, 64, 16, 16)

    def keep(k):
        return lambda m, i, o: seen.update({f'body_{k}': tuple(o.shape)})

    hooks = [m.register_forward_hook(keep(k)) for k, m in block.named_children()]
    block(x)
    for h in hooks:
        h.remove()
    nodes, _ = module_graph(block, x)
    assert [o['text'] for o in nodes.values()] == [
        'x',
        '3×3 conv /2\nBN ReLU',
        '3×3 conv\nBN',
        '1×1 conv /2\nBN',
        'add\nReLU',
        'y',
    ]
    for k in ('body_conv1', 'body_conv2'):
        assert nodes[k]['shape'] == seen[k]


@pytest.mark.parametrize('make', [list, lambda o: {f'C{i}': m for i, m in enumerate(o)}, tuple])
def test_many_inputs(make):
    def climb(a, b):
        return [a + nn.functional.interpolate(b, size=a.shape[-2:]), b]

    class One(nn.Module):
        def forward(self, xs):
            return climb(*[xs[k] for k in keys])

    class Pair(nn.Module):
        def forward(self, a, b):
            return climb(a, b)

    x = make([torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)])
    keys = list(x) if isinstance(x, dict) else [0, 1]
    nodes, edges = module_graph(Pair() if isinstance(x, tuple) else One(), x)
    assert [l for *_, l in edges if l] == ['×2'] and sum(n.startswith('out ') for n in nodes) == 2
    rows = layered(nodes, edges)
    assert rows['add'][0] < rows[edges[1][0]][0]  # the finer map stands above the coarser


def test_what_cannot_be_drawn():
    class Moody(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match='^torch.fx cannot trace Moody .*whole') as e:
        module_graph(Moody(), torch.ones(1, 3, 4, 4))
    assert '\n' not in str(e.value)
    nodes, _ = module_graph(nn.Sequential(ConvNormAct(3, 3), Moody()), torch.ones(1, 3, 4, 4), whole=dict(Moody='mood'))
    assert [o['text'] for o in nodes.values()] == ['x', '3×3 conv\nBN ReLU', 'mood', 'y']
    long = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(50)])
    with pytest.raises(ValueError, match='at most 40'):
        draw_module_graph(long, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match='expected names from a: '):
        draw_blocks(dict(a=(0, 0, 'a', 'layer')), [('a', 'b')])
    with pytest.raises(ValueError, match='kind'):
        draw_blocks(dict(a=(0, 0, 'a', 'cloud')), [])
