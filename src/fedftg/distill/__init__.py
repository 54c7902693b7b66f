"""The core: teachers, class counts and a generator in, a better student out. Knows no client, round or file.

Zhang, Shen, Ding, Tao, Duan, "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated
Learning", CVPR 2022, https://arxiv.org/abs/2203.09249.
"""
