# Two views of each training image: crop and flip, and the same with a black hole of 16x16 pixels.
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
                dict(type="Cutout", shape=16, pad_val=0, prob=1.0),  # published behind ToTensor, so 0 is black
            ],
        ],
    ),
    dict(type="PackInputs"),
]
