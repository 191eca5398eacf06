# RSLAD with the published weights: KL divergence to a robust teacher's natural predictions, of adversarial images (5/6)
# and natural ones (1/6), without labels. Attack and weight perturbation are those of adversarial_trades.py.
#
# ikl data digits
# ikl train mmpretrain/digits/robust_teacher.py
# ikl train mmpretrain/digits/robust_distill_rslad.py
_base_ = "../_base_/digits_adversarial.py"

model = dict(
    preset="rslad",
    teacher="{{ fileDirname }}/robust_teacher.py",
    teacher_ckpt="runs/mmpretrain/digits/robust_teacher/epoch_10.pth",
)
optim_wrapper = dict(optimizer=dict(lr=0.5))  # the published weights are a tenth of the KL divergence

work_dir = "runs/mmpretrain/digits/robust_distill_rslad"
