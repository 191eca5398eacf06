# CIFAR-100 as MMPretrain reads it, which downloads what is not there. It comes in RGB: to_rgb=False goes with it.
data_root = "{{$IKL_PLUGINS_DATA:data}}/cifar100"

train_pipeline = [
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="PackInputs")]
loader = dict(num_workers=2, persistent_workers=True)

train_dataloader = dict(
    batch_size=64,
    dataset=dict(type="CIFAR100", data_root=data_root, split="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
    **loader,
)
# The test images are watched, and choose nothing: see save_best in cifar100_student.py.
val_dataloader = dict(
    batch_size=64,
    dataset=dict(type="CIFAR100", data_root=data_root, split="test", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
    **loader,
)
test_dataloader = val_dataloader

val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator
