# RSLAD with the published weights and schedule, from a ResNet-34 to a ResNet-18.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/robust_teacher.py
# ikl train mmpretrain/cifar10_folder/robust_distill_rslad.py
_base_ = "./plain.py"

model = dict(
    type="AdversarialClassifier",
    data_preprocessor=dict(mean=[0.0] * 3, std=[255.0] * 3),  # pixels in [0, 1], not normalised
    preset="rslad",
    teacher="{{ fileDirname }}/robust_teacher.py",
    teacher_ckpt="runs/mmpretrain/cifar10_folder/robust_teacher/epoch_200.pth",
    val_attack=dict(eps="8/255", steps=20, step_size=0.003, random_start="uniform", objective="cross_entropy"),
    channels_last=True,
)

train_dataloader = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(lr=0.1, weight_decay=2e-4))
param_scheduler = dict(milestones=[215, 260, 285])
train_cfg = dict(max_epochs=300)
val_evaluator = [dict(type="Accuracy", topk=(1,)), dict(type="RobustAccuracy", topk=(1,))]
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best="robust/top1"))

work_dir = "runs/mmpretrain/cifar10_folder/robust_distill_rslad"
