# GKL with the class prior; alpha, beta and gamma are those published for resnet56 -> resnet20 on CIFAR-100. Nothing is
# published for this pair of networks.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/teacher.py
# ikl train mmpretrain/cifar10_folder/distill_gkl.py
_base_ = "./plain.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/teacher.py",
    teacher_ckpt="runs/mmpretrain/cifar10_folder/teacher/epoch_240.pth",
    teacher_val_batches=4,  # logs the accuracy of the teacher on the first 1,024 validation images
    distill_loss=dict(
        type="GKLLoss", alpha=1.0, beta=4.0, gamma=0.2, temperature=4.0, weight_temperature=4.0, global_info=True
    ),
    warmup_epochs=20,
)

work_dir = "runs/mmpretrain/cifar10_folder/distill_gkl"
