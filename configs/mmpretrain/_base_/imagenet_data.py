# ImageNet in class folders, as MMPretrain reads it. Batch sizes are in the recipes.
data_root = "{{$IKL_PLUGINS_DATA:data}}/imagenet"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    # Pillow, as torchvision's transforms have it, which the teachers were trained with: it smooths when it shrinks.
    dict(type="RandomResizedCrop", scale=224, backend="pillow"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="ResizeEdge", scale=256, edge="short", backend="pillow"),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
loader = dict(num_workers=8, persistent_workers=True)

train_dataloader = dict(
    dataset=dict(type="ImageNet", data_root=data_root, split="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
    **loader,
)
# The validation images, which are the test images of this literature, are watched, and choose nothing.
val_dataloader = dict(
    batch_size=64,
    dataset=dict(type="ImageNet", data_root=data_root, split="val", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=(1, 5))
test_evaluator = val_evaluator
