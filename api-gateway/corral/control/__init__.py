"""The control plane: admin API, prober, snapshot for the gateways, and the audit trail's way into the database."""
