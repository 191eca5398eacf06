# ARD with the published weights: KL divergence at temperature 30 of adversarial images to a robust teacher's natural
# predictions; the attack goes up the cross entropy to the labels. Weight perturbation is that of adversarial_trades.py.
#
# ikl data digits
# ikl train mmpretrain/digits/robust_teacher.py
# ikl train mmpretrain/digits/robust_distill_ard.py
_base_ = "./robust_distill_rslad.py"

model = dict(preset="ard", attack=dict(random_start="uniform", objective="cross_entropy", model_mode="train"))

work_dir = "runs/mmpretrain/digits/robust_distill_ard"
