# What every pair of CIFAR-100 adds to cifar100_student.py, but for the names of the networks and the loss.
_base_ = "./cifar100_student.py"

model = dict(
    type="DistillationClassifier",
    # No classifier around it: its names are those of mdistiller's checkpoints. It gets the student's inputs.
    teacher=dict(type="DistillationNetwork", num_classes=100),
    teacher_val_batches=157,  # logs its accuracy on all test images, to be compared with the README's
)
