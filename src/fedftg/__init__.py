"""Data-free fine-tuning of the global model in federated learning (FedFTG)."""
