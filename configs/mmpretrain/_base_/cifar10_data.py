# CIFAR-10 of ikl data: 45,000 training, 5,000 validation and 10,000 or fewer test images in class folders.
data_root = "{{$IKL_PLUGINS_DATA:data}}/cifar10"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackInputs")]
loader = dict(num_workers=2, persistent_workers=True)

train_dataloader = dict(
    batch_size=64,
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
    **loader,
)
val_dataloader = dict(
    batch_size=256,
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="val", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)
test_dataloader = dict(
    batch_size=256,
    dataset=dict(type="CustomDataset", data_root=data_root, data_prefix="test", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)

val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator
