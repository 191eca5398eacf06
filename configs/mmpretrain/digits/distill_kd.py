# The baseline: the classic distillation loss, 0.1 cross entropy + 0.9 * 4**2 KL at temperature 4.
#
# ikl data digits
# ikl train mmpretrain/digits/teacher.py
# ikl train mmpretrain/digits/distill_kd.py
_base_ = "./plain.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/teacher.py",
    teacher_ckpt="runs/mmpretrain/digits/teacher/epoch_10.pth",
    teacher_val_batches=1,  # logs the accuracy of the teacher on the first validation batch
    head=dict(loss=dict(loss_weight=0.1)),
    distill_loss=dict(type="KLLoss", temperature=4.0, scale_by_temperature_squared=True),
    distill_weight=0.9,
)

work_dir = "runs/mmpretrain/digits/distill_kd"
