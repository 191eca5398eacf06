# RobustBench's own WideResNet, the smallest one there is: pixels in [0, 1], not normalised, 32x32.
model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(num_classes=10, mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True),
    backbone=dict(type="RobustBenchNetwork", architecture="WideResNet-10-1", num_classes=10),
    head=dict(type="LogitsClsHead", num_classes=10, loss=dict(type="CrossEntropyLoss", loss_weight=1.0), topk=(1,)),
)
