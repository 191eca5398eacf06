# TRADES: cross entropy on natural images, and 6 times the KL divergence between natural and adversarial predictions.
#
# ikl data digits
# ikl train mmpretrain/digits/adversarial_trades.py
_base_ = "../_base_/digits_adversarial.py"

model = dict(robust_loss=dict(type="KLLoss", loss_weight=6.0))

work_dir = "runs/mmpretrain/digits/adversarial_trades"
