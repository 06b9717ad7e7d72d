"""What tests share: certificates good and bad, apps that note every byte, and programs run for real."""
