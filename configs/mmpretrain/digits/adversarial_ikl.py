# IKL in place of the KL divergence of adversarial_trades.py, with the weights of the class prior.
#
# ikl data digits
# ikl train mmpretrain/digits/adversarial_ikl.py
_base_ = "../_base_/digits_adversarial.py"

model = dict(robust_loss=dict(type="IKLLoss", alpha=4.0, beta=20.0, weight_temperature=4.0, global_info=True))

work_dir = "runs/mmpretrain/digits/adversarial_ikl"
