# robust_distill_rslad.py with IKL in place of the KL divergence; the class prior is of the teacher's predictions.
#
# ikl data digits
# ikl train mmpretrain/digits/robust_teacher.py
# ikl train mmpretrain/digits/robust_distill_rslad_ikl.py
_base_ = "./robust_distill_rslad.py"

model = dict(preset="rslad-ikl")

work_dir = "runs/mmpretrain/digits/robust_distill_rslad_ikl"
