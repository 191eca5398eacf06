# Two views of each training image: crop and flip, and the same with AutoAugment's policy for CIFAR-10 as the authors'
# autoaug.py has it, which they use for CIFAR-100 as well.
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
                dict(type="CIFAR10AutoAugment"),
            ],
        ],
    ),
    dict(type="PackInputs"),
]
