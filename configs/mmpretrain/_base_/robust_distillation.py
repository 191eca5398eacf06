# Adversarial distillation on CIFAR as RSLAD has it, but for classes, teacher and student: 300 epochs of SGD, 128 images
# a step, random crop and flip, pixels in [0, 1] without normalisation, no weight perturbation, no averaged weights.
_base_ = "./wrn_34_10.py"

pixels = dict(mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False)  # MMPretrain reads CIFAR as RGB
model = dict(
    _delete_=True,
    type="AdversarialClassifier",
    data_preprocessor=dict(type="ClsDataPreprocessor", **pixels),
    head=dict(type="LogitsClsHead", loss=dict(type="CrossEntropyLoss", loss_weight=1.0), topk=(1,)),
    teacher_input=pixels,
    val_attack=dict(eps="8/255", steps=20, step_size=0.003, random_start="uniform", objective="cross_entropy"),
    channels_last=True,
)

optim_wrapper = dict(optimizer=dict(lr=0.1, weight_decay=2e-4))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[215, 260, 285], gamma=0.1)]
train_cfg = dict(max_epochs=300)
custom_hooks = [dict(type="IKLHook"), dict(type="SyncBuffersHook")]
