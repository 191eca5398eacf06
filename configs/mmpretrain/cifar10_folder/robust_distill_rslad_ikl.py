# robust_distill_rslad.py with IKL in place of the KL divergence; the class prior is of the teacher's predictions.
#
# ikl data cifar10-folder --from ZIP...
# ikl train mmpretrain/cifar10_folder/robust_teacher.py
# ikl train mmpretrain/cifar10_folder/robust_distill_rslad_ikl.py
_base_ = "./robust_distill_rslad.py"

model = dict(preset="rslad-ikl")

work_dir = "runs/mmpretrain/cifar10_folder/robust_distill_rslad_ikl"
