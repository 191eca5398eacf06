# IKL with the weights of the class prior, which IKLHook rolls at the end of each epoch.
#
# ikl data digits
# ikl train mmpretrain/digits/teacher.py
# ikl train mmpretrain/digits/distill_ikl.py
_base_ = "./plain.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/teacher.py",
    teacher_ckpt="runs/mmpretrain/digits/teacher/epoch_10.pth",
    teacher_val_batches=1,  # logs the accuracy of the teacher on the first validation batch
    distill_loss=dict(type="IKLLoss", preset="start", global_info=True),
    warmup_epochs=2,
)

work_dir = "runs/mmpretrain/digits/distill_ikl"
