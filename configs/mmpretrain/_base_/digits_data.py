# The digits of ikl data: 1,200 training, 297 validation and 300 test images in class folders.
data_root = "{{$IKL_PLUGINS_DATA:data}}/digits"

pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(16, 16)),  # the digits were 8x8 once; 16x16 costs a quarter of 32x32
    dict(type="PackInputs"),
]
loader = dict(num_workers=0, persistent_workers=False, pin_memory=False)

train_dataloader = dict(
    batch_size=32,
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="train", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
    **loader,
)
val_dataloader = dict(
    batch_size=300,
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="val", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)
test_dataloader = dict(
    batch_size=300,
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="test", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)

val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator
