# IKL as in the published CIFAR-100 recipe: no class prior, but weights at temperature 100 and so nearly uniform. alpha
# and beta are those of resnet56 -> resnet20. Nothing is published for this pair of networks.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/teacher.py
# ikl train mmpretrain/cifar10_folder/distill_ikl.py
_base_ = "./plain.py"

model = dict(
    type="DistillationClassifier",
    teacher="{{ fileDirname }}/teacher.py",
    teacher_ckpt="runs/mmpretrain/cifar10_folder/teacher/epoch_240.pth",
    teacher_val_batches=4,  # logs the accuracy of the teacher on the first 1,024 validation images
    distill_loss=dict(type="IKLLoss", alpha=1.0, beta=4.0, temperature=4.0, weight_temperature=100.0),
    warmup_epochs=20,
)

work_dir = "runs/mmpretrain/cifar10_folder/distill_ikl"
