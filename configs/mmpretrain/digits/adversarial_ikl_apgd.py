# adversarial_ikl.py, but its best checkpoint is chosen by AutoAttack's APGD-CE on 100 validation images.
#
# ikl data digits
# ikl train mmpretrain/digits/adversarial_ikl_apgd.py
_base_ = "adversarial_ikl.py"

custom_hooks = [
    *_base_.custom_hooks,
    dict(type="RobustEvaluationHook", eps="16/255", n_examples=100, interval=5),
]
default_hooks = dict(checkpoint=dict(save_best="robust/apgd-ce"))

work_dir = "runs/mmpretrain/digits/adversarial_ikl_apgd"
