# Three stages of two blocks with 8, 16 and 32 channels.
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(num_classes=10, mean=[79.0] * 3, std=[84.0] * 3, to_rgb=True),
    backbone=dict(
        type="ResNet_CIFAR",
        depth=18,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stem_channels=8,
        base_channels=8,
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=32,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
