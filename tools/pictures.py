"""Draws the site's own pictures into nbs/images from live models: the overview, the card that links show, the icon."""

import os
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from backbones_nb import create_backbone
from backbones_nb.analysis.boxes import draw_boxes
from backbones_nb.analysis.draw import draw_backbone, SLOT
from backbones_nb.analysis.palette import mix, palette
from backbones_nb.analysis.sample import sample_image, sample_target
from backbones_nb.necks.build import attach_neck

images = Path(__file__).resolve().parent.parent / 'nbs' / 'images'
arrow = dict(arrowstyle='-|>', color=palette['line'], lw=1.4, mutation_scale=12)


def panel(ax, img, title):
    ax.imshow(img)
    ax.set_title(title, fontsize=12)
    ax.axis('off')


def overview():
    "An image, the live backbone and neck, heads, and the image with its boxes, joined by arrows."
    fig, axs = plt.subplots(1, 3, figsize=(13.2, 4), width_ratios=(1, 4.1, 1))
    fig.subplots_adjust(0.01, 0.02, 0.99, 0.92, wspace=0.06)
    img, mid = sample_image(448), axs[1]
    panel(axs[0], img, 'image')
    draw_backbone(attach_neck(create_backbone('vovnet19_slim')), size=224, ax=mid)
    last = 6 * SLOT  # stage2 to stage5, under P2 to P5
    for i in range(3):  # the top-down pathway of the pyramid
        x = last - i * SLOT
        mid.annotate('', (x - 0.62 * SLOT, 1.95), (x - 0.36 * SLOT, 1.95), arrowprops=arrow)
    left, right = mid.get_xlim()
    mid.set_xlim(left, right + 1.5 * SLOT)
    x, y, w, h = last + 0.95 * SLOT, 1.2, 1.0 * SLOT, 1.5
    mid.add_patch(
        FancyBboxPatch(
            (x, y),
            w,
            h,
            boxstyle='round,pad=0.02,rounding_size=.1',
            fc=mix(palette['head'], 0.15),
            ec=palette['head'],
            lw=1.4,
        )
    )
    mid.text(
        x + w / 2,
        y + h / 2,
        'heads:\nclass, box\nat every\nlevel',
        ha='center',
        va='center',
        fontsize=10,
        color=mix(palette['head'], 0.8, 'black'),
    )
    mid.annotate('', (x - 0.03, 1.95), (last + 0.5 * SLOT, 1.95), arrowprops=arrow)
    draw_boxes(img, sample_target(448), ['background', 'cat', 'dog'], ax=axs[2])
    axs[2].set_title('boxes', fontsize=12)
    fig.canvas.draw()  # places the axes, whose aspect is fixed

    def at(ax, *xy):
        return fig.transFigure.inverted().transform(ax.transData.transform(xy))

    for start, end in (
        (at(axs[0], 456, 330), at(mid, -0.35 * SLOT, 0.1)),
        (at(mid, x + w + 0.05, 1.95), at(axs[2], -8, 150)),
    ):
        fig.add_artist(FancyArrowPatch(start, end, transform=fig.transFigure, **arrow))
    fig.savefig(images / 'overview.png', dpi=160, metadata=dict(Software=None))
    plt.close(fig)


def card():
    "1200 x 630 pixels: the name, what it is, the overview."
    fig = plt.figure(figsize=(12, 6.3), facecolor='white')
    fig.text(0.05, 0.83, 'backbones-nb', fontsize=46, weight='bold', color='#0b4f7d')
    fig.text(
        0.05,
        0.73,
        'Understand and use detection backbones: a notebook course and a library',
        fontsize=21,
        color=palette['ink'],
    )
    ax = fig.add_axes((0.03, 0.06, 0.94, 0.6))
    ax.imshow(plt.imread(images / 'overview.png'))
    ax.axis('off')
    fig.savefig(images / 'card.png', dpi=100, metadata=dict(Software=None))
    plt.close(fig)


def icon():
    "A pyramid of three levels in the colors of backbone, neck and head."
    bars = [(4, 21, 24, palette['backbone']), (8, 13, 16, palette['neck']), (12, 5, 8, palette['head'])]
    body = ''.join(f'<rect x="{x}" y="{y}" width="{w}" height="6" rx="1.5" fill="{c}"/>' for x, y, w, c in bars)
    (images / 'favicon.svg').write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><title>backbones-nb</title>{body}</svg>\n'
    )


def shrink(name):
    Image.open(images / name).convert('RGB').quantize(256).save(images / name, optimize=True)


if __name__ == '__main__':
    overview()
    card()
    icon()
    for o in ('overview.png', 'card.png'):
        shrink(o)
