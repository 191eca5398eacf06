# The baseline: the classic distillation loss, 0.1 cross entropy + 0.9 * 4**2 KL at temperature 4.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/teacher.py
# ikl train mmpretrain/cifar10_folder/distill_kd.py
_base_ = "./plain.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/teacher.py",
    teacher_ckpt="runs/mmpretrain/cifar10_folder/teacher/epoch_240.pth",
    teacher_val_batches=4,  # logs the accuracy of the teacher on the first 1,024 validation images
    head=dict(loss=dict(loss_weight=0.1)),
    distill_loss=dict(type="KLLoss", temperature=4.0, scale_by_temperature_squared=True),
    distill_weight=0.9,
)

work_dir = "runs/mmpretrain/cifar10_folder/distill_kd"
