"Draws nbs/images/overview.png, the picture of the README, from live models: an image, backbone and neck, the boxes."
import os
from pathlib import Path

os.environ['MPLBACKEND'] = 'Agg'
import matplotlib.pyplot as plt

from backbones_nb import create_backbone
from backbones_nb.core.draw import draw_backbone, draw_boxes, sample_image, sample_target
from backbones_nb.necks.neck import attach_neck

root = Path(__file__).resolve().parent.parent
fig,axs = plt.subplots(1, 3, figsize=(13, 4), layout='constrained', width_ratios=(1, 3.2, 1))
img = sample_image(224)
axs[0].imshow(img)
axs[0].axis('off')
axs[0].set_title('image')
draw_backbone(attach_neck(create_backbone('vovnet19_slim')), size=224, ax=axs[1])
draw_boxes(img, sample_target(224), ['background','cat','dog'], ax=axs[2])
axs[2].set_title('boxes')
fig.savefig(root/'nbs'/'images'/'overview.png', dpi=90, metadata=dict(Software=None))
