# Two views of each training image: crop and flip, and the same with a black hole of 16x16 pixels, clipped at the edges.
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
                dict(type="ClippedCutout", size=16),
            ],
        ],
    ),
    dict(type="PackInputs"),
]
