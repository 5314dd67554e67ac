-- The ledger beside Prefect's own database, which the server makes.
CREATE DATABASE ledger;
