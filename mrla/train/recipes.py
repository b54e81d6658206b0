"""The recipes that have a name.

A recipe is a function that returns a `Recipe`; its docstring says where the numbers come from and what it costs. The
command line overrides fields, it does not define them.
"""

from collections.abc import Callable
from dataclasses import replace

from mrla.data.sources import IMAGENET_MEAN, IMAGENET_STD, Cifar10, Coco, Digits, Folder, Shapes
from mrla.messages.suggestions import nearest

from .recipe import DetectorOptions, Machine, MixerOptions, Optim, Recipe


def digits_resnet18() -> Recipe:
    """A narrow ResNet-18 on scikit-learn's 1,797 scans of digits: the default, nothing to download.

    Ours: chosen on the validation part so that a network trains in seconds on one CPU core and both arms end above 97 %
    (3 warm-up epochs, because with 1 both end lower); measured scores are in docs/tasks/compare.md. Run:
    ``mrla train`` or ``mrla compare``.
    """
    return Recipe(
        recipe="digits_resnet18",
        model="resnet18_cifar",
        model_args={"channels": [16, 32, 64, 128]},
        data=Digits(),
        optim=Optim(lr=0.1, weight_decay=5e-4, schedule="cosine", warmup_epochs=3),
        epochs=30,
        batch_size=64,
        label_smoothing=0.1,
        # One thread, so that several runs at once give the numbers of one at a time.
        machine=Machine(accelerator="cpu", threads=1),
    )


def cifar10_resnet18() -> Recipe:
    """The Paddle notebook's experiment: ResNet-18 with a 3x3 stem on CIFAR-10, its settings exactly.

    SGD 0.1, momentum 0.9, weight decay 1e-5 on everything, x0.1 at epochs 30, 60 and 80, 100 epochs, batch 256, label
    smoothing 0.1 in both losses, seed 42. The notebook reports 0.8935 validation accuracy with MRLA and 0.8852 without,
    one run each. Ours: not run. Run: ``mrla train --recipe cifar10_resnet18 --data.root DIR``.
    """
    return Recipe(
        recipe="cifar10_resnet18",
        model="resnet18_cifar",
        init="notebook",
        data=Cifar10(),
        optim=Optim(lr=0.1, weight_decay=1e-5, schedule="multistep", milestones=(30, 60, 80)),
        epochs=100,
        batch_size=256,
        label_smoothing=0.1,
        smooth_validation=True,
        seed=42,
    )


def imagenet_resnet50() -> Recipe:
    """The released recipe: ResNet-50 on ImageNet-1k, or any folder with ``train/`` and ``val/``.

    SGD 0.1, momentum 0.9, weight decay 1e-4 on everything, batch 256, 100 epochs, x0.1 every 30, 3 warm-up epochs, no
    label smoothing, DropPath 0.2 on the mixers' branch (the plain arm has none, as in the release;
    ``--mixer.drop_path 0`` for an equal comparison). The name of the authors' checkpoint says 77.75 % top-1 (plain
    76.1), one run. Ours: not run. Run: ``mrla train --recipe imagenet_resnet50 --data.root DIR --machine.devices 8
    --machine.strategy ddp``.
    """
    return Recipe(
        recipe="imagenet_resnet50",
        model="resnet50",
        mixer=MixerOptions(drop_path=0.2),
        data=Folder(
            root="imagenet",
            size=224,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            interpolation="bilinear",
            crop_pct=0.875,
        ),
        optim=Optim(lr=0.1, weight_decay=1e-4, schedule="multistep", milestones=(30, 60, 90), warmup_epochs=3),
        epochs=100,
        batch_size=256,
    )


def finetune() -> Recipe:
    """A trained network on your own images: what is new first, then everything, the old weights ten times slower.

    In the first 2 of 12 epochs mixers and classifier are trained while the rest stays as it is, norms too; the plain
    arm trains its classifier, so that both arms have the same epochs. Size and normalisation are those that the network
    was trained with. The numbers are usual ones, not tuned; ours: not run on photographs, for no weights could be
    fetched. Run: ``mrla compare --recipe finetune --model NAME|FOLDER --data.root DIR``, or ``mrla train`` with
    the same flags.
    """
    return Recipe(
        recipe="finetune",
        model="resnet50",
        pretrained=True,
        init="identity",
        data=Folder(),
        optim=Optim(
            name="adamw",
            lr=1e-3,
            weight_decay=0.05,
            decay_vectors=False,
            schedule="cosine",
            warmup_epochs=1,
            clip_grad_norm=1.0,
            frozen_epochs=2,
            old_lr_scale=0.1,
        ),
        epochs=12,
        batch_size=64,
        label_smoothing=0.1,
    )


def coco_faster_rcnn_r50() -> Recipe:
    """Faster R-CNN with ResNet-50 and a feature pyramid on COCO, the released 1x schedule.

    SGD 0.02 for batch 16, momentum 0.9, weight decay 1e-4, 12 epochs, x0.1 after 8 and 11, stem and first stage frozen,
    BatchNorm in eval mode, images of 800 to 1333 pixels. One warm-up epoch stands for the released 500 steps. The paper
    reports 3 to 4 AP over the plain backbone; plain is 37.4. Ours: not run. Run: ``mrla train --recipe
    coco_faster_rcnn_r50 --model RUN_OR_FOLDER --data.root DIR --machine.devices 8 --machine.strategy ddp``.
    """
    return Recipe(
        recipe="coco_faster_rcnn_r50",
        model="resnet50",
        pretrained=True,
        init="identity",
        data=Coco(masks=False),
        detector=DetectorOptions(name="faster_rcnn"),
        optim=Optim(lr=0.02, weight_decay=1e-4, schedule="multistep", milestones=(8, 11), warmup_epochs=1),
        epochs=12,
        batch_size=16,
    )


def coco_retinanet_r50() -> Recipe:
    """RetinaNet with ResNet-50 on COCO, the released 1x schedule: as Faster R-CNN, with half its learning rate.

    Plain is 36.5 AP. Ours: not run. Run: ``mrla train --recipe coco_retinanet_r50``, further as Faster R-CNN.
    """
    faster = coco_faster_rcnn_r50()
    return replace(
        faster,
        recipe="coco_retinanet_r50",
        detector=DetectorOptions(name="retinanet"),
        optim=replace(faster.optim, lr=0.01),
    )


def coco_mask_rcnn_r50() -> Recipe:
    """Mask R-CNN with ResNet-50 on COCO, the released 1x schedule: as Faster R-CNN, with masks.

    Ours: not run. Run: ``mrla train --recipe coco_mask_rcnn_r50``, further as Faster R-CNN.
    """
    return replace(
        coco_faster_rcnn_r50(),
        recipe="coco_mask_rcnn_r50",
        data=Coco(),
        detector=DetectorOptions(name="mask_rcnn"),
    )


def shapes_mask_rcnn() -> Recipe:
    """Mask R-CNN with a narrow ResNet-18 on drawn shapes of 96x96: nothing to download, minutes on a CPU.

    Ours: sizes and rates chosen so that a comparison of two arms with two seeds ends within minutes on two cores;
    measured scores are in docs/tasks/detect.md. Run: ``mrla train --recipe shapes_mask_rcnn``, or ``mrla compare``
    with the same flags.
    """
    return Recipe(
        recipe="shapes_mask_rcnn",
        model="resnet18",
        model_args={"channels": [32, 64, 96, 128]},
        init="identity",
        data=Shapes(),
        detector=DetectorOptions(
            name="mask_rcnn",
            min_size=96,
            max_size=96,
            freeze_stages=-1,
            norm_eval=False,
            fpn_channels=64,
            options={
                "box_head_dim": 128,
                "mask_head_dim": 32,
                "mask_head_layers": 2,
                "rpn_pre_nms_top_n_train": 300,
                "rpn_post_nms_top_n_train": 150,
                "rpn_pre_nms_top_n_test": 150,
                "rpn_post_nms_top_n_test": 75,
                "box_batch_size_per_image": 64,
                "detections_per_image": 20,
            },
        ),
        optim=Optim(
            name="adamw", lr=1e-3, weight_decay=0.05, decay_vectors=False, warmup_epochs=1, clip_grad_norm=10.0
        ),
        epochs=10,
        batch_size=8,
        machine=Machine(accelerator="cpu", threads=1),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        digits_resnet18,
        cifar10_resnet18,
        imagenet_resnet50,
        finetune,
        shapes_mask_rcnn,
        coco_faster_rcnn_r50,
        coco_retinanet_r50,
        coco_mask_rcnn_r50,
    )
}
"""The functions that make the recipes, by name."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Args:
        name: One of `RECIPES`.

    Returns:
        The recipe, as its function gives it.

    Raises:
        ValueError: If there is none, with the nearest name.

    Example:
        >>> get_recipe("cifar10_resnet18").epochs
        100
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}: got {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()
