# Two views of each training image: crop and flip, and the same with AutoAugment's policy for CIFAR-10, which the
# authors use for CIFAR-100 as well. MMPretrain has the transforms, but of the policies that for ImageNet alone.
#
# The 25 pairs are those of Cubuk et al., CVPR 2019, with the ranges that torchvision gives their levels from 0 to 9.
# NOT VERIFIED: which implementation the authors use; some fill with black where this one fills with grey.
cifar10_policy = [
    [dict(type="Invert", prob=0.1), dict(type="Contrast", magnitude=0.1 * 6, prob=0.2)],
    [
        dict(type="Rotate", angle=30 / 9 * 2, prob=0.7),
        dict(type="Translate", magnitude=150 / 331 / 9 * 9, direction="horizontal", prob=0.3),
    ],
    [dict(type="Sharpness", magnitude=0.1 * 1, prob=0.8), dict(type="Sharpness", magnitude=0.1 * 3, prob=0.9)],
    [
        dict(type="Shear", magnitude=0.3 / 9 * 8, direction="vertical", prob=0.5),
        dict(type="Translate", magnitude=150 / 331 / 9 * 9, direction="vertical", prob=0.7),
    ],
    [dict(type="AutoContrast", prob=0.5), dict(type="Equalize", prob=0.9)],
    [
        dict(type="Shear", magnitude=0.3 / 9 * 7, direction="vertical", prob=0.2),
        dict(type="Posterize", bits=5, prob=0.3),
    ],
    [dict(type="ColorTransform", magnitude=0.1 * 3, prob=0.4), dict(type="Brightness", magnitude=0.1 * 7, prob=0.6)],
    [dict(type="Sharpness", magnitude=0.1 * 9, prob=0.3), dict(type="Brightness", magnitude=0.1 * 9, prob=0.7)],
    [dict(type="Equalize", prob=0.6), dict(type="Equalize", prob=0.5)],
    [dict(type="Contrast", magnitude=0.1 * 7, prob=0.6), dict(type="Sharpness", magnitude=0.1 * 5, prob=0.6)],
    [
        dict(type="ColorTransform", magnitude=0.1 * 7, prob=0.7),
        dict(type="Translate", magnitude=150 / 331 / 9 * 8, direction="horizontal", prob=0.5),
    ],
    [dict(type="Equalize", prob=0.3), dict(type="AutoContrast", prob=0.4)],
    [
        dict(type="Translate", magnitude=150 / 331 / 9 * 3, direction="vertical", prob=0.4),
        dict(type="Sharpness", magnitude=0.1 * 6, prob=0.2),
    ],
    [dict(type="Brightness", magnitude=0.1 * 6, prob=0.9), dict(type="ColorTransform", magnitude=0.1 * 8, prob=0.2)],
    [dict(type="Solarize", thr=255 - 255 / 9 * 2, prob=0.5), dict(type="Invert", prob=0.0)],
    [dict(type="Equalize", prob=0.2), dict(type="AutoContrast", prob=0.6)],
    [dict(type="Equalize", prob=0.2), dict(type="Equalize", prob=0.6)],
    [dict(type="ColorTransform", magnitude=0.1 * 9, prob=0.9), dict(type="Equalize", prob=0.6)],
    [dict(type="AutoContrast", prob=0.8), dict(type="Solarize", thr=255 - 255 / 9 * 8, prob=0.2)],
    [dict(type="Brightness", magnitude=0.1 * 3, prob=0.1), dict(type="ColorTransform", magnitude=0.1 * 0, prob=0.7)],
    [dict(type="Solarize", thr=255 - 255 / 9 * 5, prob=0.4), dict(type="AutoContrast", prob=0.9)],
    [
        dict(type="Translate", magnitude=150 / 331 / 9 * 9, direction="vertical", prob=0.9),
        dict(type="Translate", magnitude=150 / 331 / 9 * 9, direction="vertical", prob=0.7),
    ],
    [dict(type="AutoContrast", prob=0.9), dict(type="Solarize", thr=255 - 255 / 9 * 3, prob=0.8)],
    [dict(type="Equalize", prob=0.8), dict(type="Invert", prob=0.1)],
    [
        dict(type="Translate", magnitude=150 / 331 / 9 * 9, direction="vertical", prob=0.7),
        dict(type="AutoContrast", prob=0.9),
    ],
]

two_views = [
    dict(
        type="MultiView",
        num_views=[1, 1],
        transforms=[
            [
                dict(type="RandomCrop", crop_size=32, padding=4),
                dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            ],
            [
                dict(type="RandomCrop", crop_size=32, padding=4),
                dict(type="RandomFlip", prob=0.5, direction="horizontal"),
                # The colour transforms expect BGR, CIFAR is RGB: there and back.
                dict(type="NumpyToPIL", to_rgb=True),
                dict(type="PILToNumpy"),
                dict(type="AutoAugment", policies=cifar10_policy),
                dict(type="NumpyToPIL", to_rgb=True),
                dict(type="PILToNumpy"),
            ],
        ],
    ),
    dict(type="PackInputs"),
]
