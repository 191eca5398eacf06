# ResNet-18 for 32x32 images.
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(
        num_classes=10, mean=[125.307, 122.961, 113.8575], std=[62.985, 62.0925, 66.708], to_rgb=True
    ),
    backbone=dict(type="ResNet_CIFAR", depth=18, out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=10,
        in_channels=512,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        topk=(1,),
    ),
)
