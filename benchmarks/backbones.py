"""Times backbones of ours against timm's same nets, forward and training step, alternating in one run.

    python benchmarks/backbones.py [PATTERN ...] [--size 224] [--batch 1] [--repeats 15] [--threads 1] [--device cpu]
                                   [--clock wall|cpu] [--target 0.97]

Prints the medians and the ratio of speeds (timm's time / ours); exits with 1 where a ratio is below the target.
The ratio is the median over pairs of neighboring runs, so that a slow drift of the machine falls out of it.
`--clock cpu` counts processor time, which other processes on a busy machine disturb less."""

import argparse
import sys
from fnmatch import fnmatch
from statistics import median
from time import perf_counter, process_time

import timm
import torch

from backbones_nb.backbones.csp_convert import convert_split
from backbones_nb.backbones.cspdarknet import cspdarknet_timm_renames as cspdarknet_renames
from backbones_nb.backbones.darknet import darknet_timm_renames as darknet_renames
from backbones_nb.backbones.vovnet import vovnet_timm_renames as vovnet_renames
from backbones_nb.analysis.parity import map_weights, rel_error
from backbones_nb.core.create import create_backbone

rows = {  # ours[-split] -> timm's name, our arguments, key renames from timm's to ours; timm's own arguments
    'darknet53': ('darknet53', dict(variant='timm'), darknet_renames, dict(out_indices=(2, 3, 4, 5))),
    **{
        f'cspdarknet53-{o}': (
            'cspdarknet53',
            dict(variant='timm', split=o),
            cspdarknet_renames,
            dict(out_indices=(2, 3, 4, 5)),
        )
        for o in ('slice', 'convs')
    },
    'vovnet39': ('ese_vovnet39b', dict(variant='timm'), vovnet_renames),
    'vovnet57': ('ese_vovnet57b', dict(variant='timm'), vovnet_renames),
    'vovnet99': ('ese_vovnet99b', dict(variant='timm'), vovnet_renames),
    'vovnet19_slim': ('ese_vovnet19b_slim', dict(variant='timm'), vovnet_renames),
    'vovnet19_slim_dw': ('ese_vovnet19b_slim_dw', dict(variant='timm'), vovnet_renames),
    'vovnet19_dw': ('ese_vovnet19b_dw', dict(variant='timm'), vovnet_renames),
}


def forward(m, x, opt):
    with torch.no_grad():
        m(x)


def step(m, x, opt):
    opt.zero_grad()
    sum(o.mean() for o in m(x)).backward()
    opt.step()


def timed(clock, f, *args):
    if args[1].is_cuda:
        torch.cuda.synchronize()
    t = clock()
    f(*args)
    if args[1].is_cuda:
        torch.cuda.synchronize()
    return clock() - t


def compare(
    nets,  # two modules: ours, the reference
    x,  # images (B,3,H,W)
    what,  # forward or step
    repeats: int,
    clock=perf_counter,  # or process_time
):  # median seconds of each, the median over pairs of reference time / our time
    "Times both nets in turn; which of them begins changes from pair to pair."
    opts = [torch.optim.SGD(m.parameters(), 1e-6, momentum=0.9) for m in nets]
    for m in nets:
        m.train(what is step)
    times = [[], []]
    for r in range(repeats + 2):  # the first two pairs warm up
        for i in (0, 1) if r % 2 else (1, 0):
            times[i].append(timed(clock, what, nets[i], x, opts[i]))
    a, b = (t[2:] for t in times)
    return median(a), median(b), median(q / p for p, q in zip(a, b))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        'patterns',
        nargs='*',
        metavar='PATTERN',
        default=['vovnet39'],
        help=f"one of {', '.join(rows)}, or a shell pattern",
    )
    for k, v in dict(size=224, batch=1, repeats=15, threads=1).items():
        p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--device', default='cpu')
    p.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    p.add_argument('--target', type=float, default=0.97)
    a = p.parse_args()
    names = [n for n in rows if any(fnmatch(n, o) for o in a.patterns)]
    if a.clock == 'cpu' and a.device != 'cpu':
        p.error(
            f'got --clock cpu with --device {a.device}, expected --clock wall: processor time does not see the device'
        )
    if not names:
        p.error(f"no row matches {' '.join(a.patterns)!r}, expected one of {', '.join(rows)} or a pattern of these")
    torch.set_num_threads(a.threads)
    x, slow = torch.randn(a.batch, 3, a.size, a.size, device=a.device), []
    print(
        f'torch {torch.__version__}, timm {timm.__version__}, {a.device}, {a.threads} threads, '
        f'batch {a.batch}, {a.size} px, float32, {a.clock} time, medians of {a.repeats} alternating runs'
    )
    for n in names:
        ref_name, kw, renames, *theirs = rows[n]
        ref = timm.create_model(ref_name, features_only=True, **dict(out_indices=(1, 2, 3, 4)) | dict(*theirs)).to(
            a.device
        )
        name, split = n.partition('-')[0], kw.get('split')
        ours = create_backbone(name, strides=(4, 8, 16, 32), **kw | (dict(split='slice') if split else {}))
        ours = map_weights(ref, ours, renames)
        ours = (convert_split(ours, split) if split == 'convs' else ours).to(a.device)
        with torch.no_grad():
            same = max(rel_error(p, q) for p, q in zip(ours.eval()(x), ref.eval()(x)))
        if not same <= 1e-4:
            sys.exit(f'{n} and {ref_name} differ by {same:.1e}: timing nets that do different things says nothing')
        for what in (forward, step):
            t, r, ratio = compare((ours, ref), x, what, a.repeats, perf_counter if a.clock == 'wall' else process_time)
            if ratio < a.target:
                slow.append((n, what.__name__))
            print(
                f'{n:18} {what.__name__:8} ours {t * 1e3:8.1f} ms   {ref_name} {r * 1e3:8.1f} ms   '
                f'speed ratio {ratio:.3f}',
                flush=True,
            )
    if slow:
        sys.exit(f"below the target of {a.target}: " + ', '.join(map(' '.join, slow)))


if __name__ == '__main__':
    main()
