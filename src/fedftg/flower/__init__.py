"""FedFTG inside Flower: records, apps and an in-process grid. Needs the extra ``flower``; nothing else imports it."""
