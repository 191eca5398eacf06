# The teacher of the adversarial distillations: twice the channels of their network, trained with TRADES.
#
# ikl data digits
# ikl train mmpretrain/digits/robust_teacher.py
_base_ = "./adversarial_trades.py"

model = dict(backbone=dict(architecture="WideResNet-10-2"))

work_dir = "runs/mmpretrain/digits/robust_teacher"  # the distillations take its epoch_10.pth
