"""`torchrun ... train_two_strategies.py STORES OUT TEACHER`: a strategy of one kind a step, and one with a teacher."""

import sys
from pathlib import Path

from protloc.classify.train import ClassifierConfig, train_classifier
from protloc.data.store import ImageStore

stores, out, teacher = map(Path, sys.argv[1:])
real, synthetic = ImageStore(stores / 'real'), ImageStore(stores / 'synthetic')
loop = dict(steps=6, batch_size=8, lr=2e-3, evaluate_every=2, swa_start=0.5, schedule='plateau', plateau_patience=1)
config = ClassifierConfig(backbone='resnet10', loop=loop)
train_classifier(real, out / 'pretrain_finetune', config, 'pretrain_finetune', synthetic, aux_bn=True)
train_classifier(real, out / 'soft_labels', config, 'soft_labels', synthetic, teacher=teacher, aux_bn=True)
